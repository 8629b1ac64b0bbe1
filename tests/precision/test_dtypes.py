"""Dtype names: jmp's, ours, and the ones that are refused."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import widest
from mpjax.precision import dtype_name, parse_dtype

JMP = ["full", "f32", "float32", "f16", "float16", "bf16", "bfloat16", "half"]
OURS = {"fp32": jnp.float32, "single": jnp.float32, "fp16": jnp.float16}
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.parametrize("name", JMP)
def test_jmp_names_mean_what_jmp_says(name: str) -> None:
    assert parse_dtype(name) is jmp.get_policy(name).param_dtype


@pytest.mark.parametrize("name", OURS)
def test_extended_names_are_refused_by_jmp_and_read_here(name: str) -> None:
    with pytest.raises(ValueError, match="Unknown dtype"):
        jmp.get_policy(name)
    assert parse_dtype(name) is OURS[name]


def test_half_follows_the_backend_as_in_jmp(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_dtype("half") is jnp.float16
    tpu = type("Device", (), {"platform": "tpu"})()
    monkeypatch.setattr(jax, "local_devices", lambda: [tpu])
    assert parse_dtype("half") is jnp.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_in_any_guise_is_itself(dtype: type) -> None:
    assert parse_dtype(dtype) is dtype
    assert parse_dtype(np.dtype(dtype)) is dtype
    assert parse_dtype(dtype_name(dtype)) is dtype


@pytest.mark.parametrize("name", ["f64", "float64", "fp64", "double", np.float64])
def test_float64_needs_64_bit_types(name: object) -> None:
    with pytest.raises(ConfigError, match=r"here: float64 .*JAX_ENABLE_X64=1 or use f32"):
        parse_dtype(name, "here")
    with jax.enable_x64(True):
        assert parse_dtype(name) is jnp.float64
        assert dtype_name(parse_dtype(name)) == "f64"


@pytest.mark.parametrize("name", ["", "fp8", "float", "BF16", "bf16 ", "p=f32", "int8", np.int32])
def test_unknown_dtype_names_place_value_and_choices(name: object) -> None:
    with pytest.raises(ConfigError, match=r"^here: unknown dtype '.*known: float32 bfloat16"):
        parse_dtype(name, "here")


def test_unknown_dtype_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean bfloat16"):
        parse_dtype("bflot16")


def test_a_dtype_that_no_policy_holds_has_no_name() -> None:
    with pytest.raises(ConfigError, match="float8_e5m2fnuz"):
        dtype_name(jnp.float8_e5m2fnuz)


def test_wider_holds_every_value_of_both() -> None:
    for a, b in itertools.product(DTYPES, repeat=2):
        both = widest(a, b)
        assert both == widest(b, a)
        for dtype in (a, b):
            info = jnp.finfo(dtype)
            edge = np.array([info.max, info.smallest_subnormal, 1 + info.eps]).astype(dtype)
            assert (edge.astype(both).astype(dtype) == edge).all()
    assert widest(jnp.bfloat16, jnp.bfloat16) == jnp.bfloat16  # not wider than it must be
    # The control: neither 16-bit format holds the other.
    assert np.float32(1 + 2.0**-10).astype(jnp.bfloat16) == 1
    assert float(jnp.finfo(jnp.bfloat16).max) > float(jnp.finfo(jnp.float16).max)
