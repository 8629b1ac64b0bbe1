"""How residuals are named, read and refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import mpjax
from mpjax.errors import ConfigError
from mpjax.precision import Residuals, get_precision


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("none", "none"), ("bf16", "bf16"), ("bfloat16", "bf16"), ("fp16", "f16"),
        ("e4m3", "e4m3@128"), ("e5m2@64", "e5m2@64"), ("int8@1", "int8@1"),
    ],
)  # fmt: skip
def test_a_text_is_read_and_written_alike(text: str, whole: str) -> None:
    read = Residuals.parse(text)
    assert str(read) == whole and Residuals.parse(whole) == read == Residuals.parse(read)
    assert bool(read) == (text != "none")
    precision = get_precision("bf16", residuals=text)
    for form in (precision.to_text(), precision.to_json(), precision.to_dict()):
        assert get_precision(form).residuals == read
    assert f"residuals {whole}" in str(precision)


def test_an_older_file_has_none() -> None:
    old = get_precision("fp16").to_dict()
    del old["residuals"]
    assert get_precision(json.dumps(old)) == get_precision("fp16")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("e4m4", "unknown format 'e4m4'; did you mean e4m3"),
        ("int4", "unknown format 'int4'.*write none, bf16"),
        ("bf16@64", "bf16 has no blocks; leave @64 out"),
        ("e4m3@", "block '' is no whole number"),
        ("e4m3@0", "block 0 is no whole number"),
        ("e4m3@-8", "block '-8' is no whole number"),
        (8, "8 is no text; write none"),
    ],
)
def test_what_cannot_be_read_is_one_line(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        get_precision("bf16", residuals=value)
    assert "\n" not in str(caught.value)


def test_a_function_under_autocast_keeps_what_it_computes() -> None:
    """Whose residuals are JAX's: the setting would be read and ignored."""
    precision = dataclasses.replace(get_precision("bf16"), residuals=Residuals("e4m3"))
    with pytest.raises(ConfigError, match="residuals=e4m3@128 is of modules.*from_saved"):
        mpjax.autocast(lambda x: x, precision)
