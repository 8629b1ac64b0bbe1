"""Settings of the moments' storage."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import pytest

from mpjax.errors import ConfigError
from mpjax.precision import Moments

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize(("first", "second"), list(itertools.product(DTYPES, repeat=2)))
def test_text_round_trips(first: type, second: type) -> None:
    moments = Moments(first, second)
    assert Moments.parse(str(moments)) == moments
    assert hash(Moments.parse(str(moments))) == hash(moments)


def test_a_field_left_out_is_float32() -> None:
    assert Moments.parse("first=bf16") == Moments(jnp.bfloat16, jnp.float32)
    assert Moments.parse("second=fp16") == Moments(jnp.float32, jnp.float16)
    assert Moments.parse("second=fp16,first=bf16") == Moments(jnp.bfloat16, jnp.float16)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int3", "moments: unknown format 'int3'"),
        ("first=bf17", "moments: first: unknown format 'bf17'; did you mean"),
        ("frist=bf16", "bad field 'frist=bf16'"),
        ("first=bf16,first=f32", "bad field 'first=f32'"),
        ("first=bf16,", "bad field ''"),
    ],
)
def test_malformed_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Moments.parse(text)
    assert message in str(error.value) and "\n" not in str(error.value)
