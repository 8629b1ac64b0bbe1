"""Policy strings: what jmp reads, we read alike."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import jmp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpjax.errors import ConfigError
from mpjax.precision import parse_policy, policy_text

NAMES = ["full", "f32", "float32", "f16", "float16", "bf16", "bfloat16", "half"]
KEYS = {"p": ("p", "params"), "c": ("c", "compute"), "o": ("o", "output")}
SHORT = ["f32", "f16", "bf16"]


def strings() -> list[str]:
    """Every subset of fields over the short names, plus every dtype alone."""
    out = list(NAMES)
    for size in (1, 2, 3):
        for keys in itertools.combinations("pco", size):
            for values in itertools.product(SHORT, repeat=size):
                out.append(",".join(f"{k}={v}" for k, v in zip(keys, values, strict=True)))
    return out


def test_every_combination_means_what_jmp_says() -> None:
    assert len(strings()) == 8 + 3 * 3 + 3 * 9 + 27
    assert {text: parse_policy(text) for text in strings()} == {
        text: jmp.get_policy(text) for text in strings()
    }


@given(
    st.lists(st.sampled_from("pco"), min_size=1, unique=True).flatmap(
        lambda keys: st.tuples(
            *(
                st.tuples(st.sampled_from(KEYS[key]), st.sampled_from(NAMES)).map("=".join)
                for key in keys
            )
        )
    )
)
def test_any_order_and_spelling_means_what_jmp_says(parts: tuple[str, ...]) -> None:
    text = ",".join(parts)
    assert parse_policy(text) == jmp.get_policy(text)


@pytest.mark.parametrize("values", list(itertools.product(SHORT, repeat=3)))
def test_text_round_trips_here_and_in_jmp(values: tuple[str, str, str]) -> None:
    text = "p={},c={},o={}".format(*values)
    policy = parse_policy(text)
    assert policy_text(policy) == text
    assert jmp.get_policy(policy_text(policy)) == policy
    assert parse_policy(policy) == policy
    assert hash(parse_policy(policy)) == hash(policy)


def test_dtype_objects_and_scalar_types_give_equal_policies() -> None:
    by_dtype = jmp.Policy(*map(jnp.dtype, ("float32", "bfloat16", "float32")))
    assert hash(parse_policy(by_dtype)) == hash(parse_policy("p=f32,c=bf16,o=f32"))


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("c=fp16", "p=f32,c=f16,o=f16"),
        ("p=fp32,c=bf16,o=single", "p=f32,c=bf16,o=f32"),
        ("fp16", "p=f16,c=f16,o=f16"),
        ("p=fp16", "p=f16,c=f16,o=f16"),
        ("p=f32, c=bf16", "p=f32,c=bf16,o=bf16"),
    ],
)
def test_extended_names_in_policies(text: str, meaning: str) -> None:
    assert policy_text(parse_policy(text)) == meaning


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown dtype ''"),
        ("bf17", "did you mean bf16"),
        ("c=bf17", "here: c: unknown dtype 'bf17'"),
        ("c=", "here: c: unknown dtype ''"),
        ("x=f32", "unknown field 'x' in 'x=f32'; write p= "),
        ("c=f32,", "unknown field ''"),
        ("c=f32,compute=f16", "field 'compute' stands twice"),
        ("c=f64", "JAX_ENABLE_X64=1 or use f32"),
        ("c=f32=f16", "unknown dtype 'f32=f16'"),
    ],
)
def test_malformed_policy_is_one_line_with_the_remedy(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="^here: ") as error:
        parse_policy(text, "here")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
