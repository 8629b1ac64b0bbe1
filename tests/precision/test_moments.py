"""Settings of the moments' storage."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp
import pytest
from hypothesis import given

from mpjax.errors import ConfigError
from mpjax.precision import Moments, get_precision
from mpjax.precision.moments import MomentFormat

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
        ("int8,int4", "bad field 'int4'"),
        ("int8,first=bf16", "bad field 'first=bf16'"),
        ("int8@0", "the block '0' of 'int8@0' is not a positive whole number; write int8@256"),
        ("first=int4@-8", "moments: first: the block '-8'"),
        ("int8@two", "or int8@tensor for one block"),
        ("e4m3@", "the block '' of 'e4m3@'"),
        ("bf16@256", "'bf16@256' gives a block to a dtype, which needs none; write bf16"),
        ("int8-liner", "unknown format 'int8-liner'; did you mean int8-linear?"),
        ("int8,keep=", "keep='' is empty"),
        ("int8,keep=a b", "keep='a b' is empty or holds a blank"),
        ("int8,min=many", "bad field 'min=many'"),
        ("int8,min=1,min=2", "bad field 'min=2'"),
        ("f32,keep=**/embed", "both moments are float32"),
        ("min=4096", "both moments are float32"),
    ],
)
def test_malformed_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Moments.parse(text)
    assert message in str(error.value) and "\n" not in str(error.value)


FORMATS = [
    "f32",
    "bf16",
    "int8",
    "int8@64",
    "int4",
    "int8@tensor",
    "e4m3",
    "e5m2@32",
    "int8-linear",
]
PATTERNS = st.lists(st.sampled_from(["**/embed", "decoder/head", "*"]), max_size=3).map(tuple)


@given(st.sampled_from(FORMATS), st.sampled_from(FORMATS), PATTERNS, st.sampled_from([0, 1, 4096]))
def test_formats_and_exclusions_round_trip(
    first: str, second: str, keep: tuple[str, ...], least: int
) -> None:
    if first == second == "f32":
        keep, least = (), 0
    moments = Moments(first, second, keep, least)
    assert Moments.parse(str(moments)) == moments
    precision = get_precision("bf16", moments=str(moments))
    assert precision.moments == moments == get_precision(precision.to_text()).moments
    assert get_precision(precision.to_json()) == precision
    assert hash(moments) == hash(Moments.parse(str(moments)))


def test_what_the_words_mean() -> None:
    assert Moments.parse("int8") == Moments(MomentFormat("int8", 256), MomentFormat("int8", 256))
    assert Moments.parse("int4").first == MomentFormat("int4", 128)
    fp8 = Moments.parse("fp8@64")  # the second moment needs range more than digits
    assert fp8 == Moments(MomentFormat("e4m3", 64), MomentFormat("e5m2", 64))
    assert Moments.parse("first=fp8").first.name == "e4m3"
    assert Moments.parse("second=fp8").second.name == "e5m2"
    assert Moments.parse("int8-linear").second == MomentFormat("int8-linear", 0)
    both = Moments.parse("keep=a/b,int8@32,min=16,keep=**/c")
    assert both.keep == ("a/b", "**/c") and both.min_size == 16 and both.first.block == 32


def test_a_single_text_is_no_list_of_patterns() -> None:
    with pytest.raises(ConfigError, match="keep='\\*\\*/embed' is one text; give a tuple"):
        Moments("int8", "int8", "**/embed")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="min=-1 is not a number of elements"):
        Moments("int8", "int8", min_size=-1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("float32", 256), "block=256 is given to float32, a dtype, which needs none"),
        (("int8", -5), "block=-5 is not a number of elements; write 256, or 0"),
        (("int8", True), "block=True is not a number of elements"),
        (("int8", 2.0), r"block=2\.0 is not a number of elements"),
        (("int16", None), "moments: .*int16"),
        ((None, 64), "moments: "),
    ],
)
def test_a_format_of_a_moment_is_checked_however_it_is_made(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        MomentFormat(*given)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="min=True is not a number of elements"):
        Moments("int8", "int8", min_size=True)


def test_codes_have_a_block_and_dtypes_one_name() -> None:
    assert MomentFormat("int4") == MomentFormat.parse("int4")
    assert MomentFormat("bf16") == MomentFormat.parse("bfloat16")
