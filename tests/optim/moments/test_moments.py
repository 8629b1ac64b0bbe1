"""Moments that are stored low: which dtype, which value, and which optimizers have none."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.optim import Blockwise, quantize_moments, wrap
from mpjax.precision import Moments, get_precision

W = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32)}
G = [jax.tree.map(lambda w, n=n: w * (0.3 + n) + 0.1, W) for n in range(3)]


pytestmark = pytest.mark.usefixtures("fast_compile")


def dtypes(state: Any) -> dict[str, str]:
    """Dtypes of the floating-point leaves by the name of the state's field."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        next(k.name for k in reversed(path) if hasattr(k, "name")): x.dtype.name
        for path, x in leaves
        if jnp.issubdtype(x.dtype, jnp.floating)
    }


def step(tx: optax.GradientTransformation, state: Any, grads: Any) -> tuple[Any, Any]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return tx.update(grads, state, W)


CASES = {
    "adam": (optax.adam(0.1), {"mu": "first", "nu": "second"}),
    "adamw": (optax.adamw(0.1), {"mu": "first", "nu": "second"}),
    "amsgrad": (optax.amsgrad(0.1), {"mu": "first", "nu": "second", "nu_max": "second"}),
    "momentum": (optax.sgd(0.1, momentum=0.9), {"trace": "first"}),
    "lion": (optax.lion(0.1), {"mu": "first"}),
    "rmsprop": (optax.rmsprop(0.1), {"nu": "second"}),
    "adafactor": (
        optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9),
        {"v_row": "second", "v_col": "second", "v": "second", "ema": "first"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_moment_is_stored_in_its_dtype(name: str) -> None:
    tx, kinds = CASES[name]
    wanted = {"first": "bfloat16", "second": "float16"}
    moments = Moments(
        jnp.bfloat16 if "first" in kinds.values() else jnp.float32,
        jnp.float16 if "second" in kinds.values() else jnp.float32,
    )
    low = quantize_moments(tx, first=moments.first, second=moments.second)
    expected = {field: wanted[kind] for field, kind in kinds.items()}
    state = low.init(W)
    assert dtypes(state) == expected
    _, state = step(low, state, G[0])
    assert dtypes(state) == expected
    assert set(dtypes(tx.init(W)).values()) == {"float32"}  # the control


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16", {"mu": "bfloat16", "nu": "bfloat16"}),
        ("first=bf16", {"mu": "bfloat16", "nu": "float32"}),
        ("second=bf16", {"mu": "float32", "nu": "bfloat16"}),
    ],
)
def test_first_and_second_apart(text: str, expected: dict[str, str]) -> None:
    opt = wrap(optax.adam(0.1), get_precision("fp32", moments=text))
    assert dtypes(opt.init(W).inner) == expected


def test_float32_moments_leave_the_optimizer_alone() -> None:
    tx = optax.adam(0.1)
    assert quantize_moments(tx) is tx


def test_values_are_the_float32_update_of_what_was_stored_rounded() -> None:
    """m <- bf16(0.9 m + 0.1 g), v <- bf16(0.999 v + 0.001 g^2), by hand in float32."""
    tx = quantize_moments(optax.adam(0.1), first="bf16", second="bf16", rounding="nearest")
    state, bf16, f32 = tx.init(W), ml_dtypes.bfloat16, np.float32
    m = v = np.zeros((4, 6), bf16)
    exact = np.zeros((4, 6), f32)
    for grads in G:
        _, state = step(tx, state, grads)
        g = np.asarray(grads["w"])
        m = (f32(0.1) * g + f32(0.9) * m.astype(f32)).astype(bf16)
        v = (f32(1 - 0.999) * (g * g) + f32(0.999) * v.astype(f32)).astype(bf16)
        exact = f32(0.1) * g + f32(0.9) * exact
    # One float32 rounding (a fused multiply-add) may tip a bfloat16 one: at most one ulp, 2^-7.
    np.testing.assert_allclose(np.asarray(state.inner[0].mu["w"], f32), m.astype(f32), rtol=2.0**-7)
    np.testing.assert_allclose(np.asarray(state.inner[0].nu["w"], f32), v.astype(f32), rtol=2.0**-7)
    assert (np.asarray(state.inner[0].mu["w"]) == m).mean() > 0.9
    assert (np.asarray(state.inner[0].mu["w"], f32) != exact).mean() > 0.9  # it is not just kept


def test_the_update_itself_is_computed_in_float32() -> None:
    tx = quantize_moments(optax.adam(0.1), first="bf16", second="bf16")
    updates, _ = step(tx, tx.init(W), G[0])
    expected, _ = step(optax.adam(0.1), optax.adam(0.1).init(W), G[0])
    assert np.array_equal(updates["w"], expected["w"])  # from zero moments nothing was rounded yet


@pytest.mark.parametrize(
    ("tx", "text", "kind"),
    [
        (optax.sgd(0.1), "first=bf16", "first"),
        (optax.sgd(0.1, momentum=0.9), "second=bf16", "second"),
        (optax.lion(0.1), "second=bf16", "second"),
        (optax.rmsprop(0.1), "first=bf16", "first"),
        (optax.sgd(0.1), "bf16", "first and second"),
    ],
)
def test_an_optimizer_without_the_moment_is_refused(tx: Any, text: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"^moments: {kind} moment is to be stored low") as error:
        wrap(tx, get_precision("fp32", moments=text)).init(W)
    assert "set moments=f32 or choose another optimizer" in str(error.value)


class Named(NamedTuple):
    mu: Any
    v: Any


@pytest.mark.parametrize(
    "tx",
    [optax.contrib.mechanize(optax.adam(0.1)), optax.contrib.schedule_free_adamw(0.1)],
    ids=["mechanic", "schedule-free"],
)
def test_copies_of_the_weights_in_a_state_are_no_moments(tx: Any) -> None:
    """Mechanic's x0 and schedule-free's z are weights, whatever their attributes are called."""
    params = Named(W["w"], 2 * W["w"])
    low = quantize_moments(tx, second="int8")
    state, exact = low.init(params).inner, tx.init(params)
    name = "x0" if hasattr(exact, "x0") else "z"
    for got, want in zip(getattr(state, name), getattr(exact, name), strict=True):
        np.testing.assert_array_equal(got, want)
    assert any(isinstance(x, Blockwise) for x in jax.tree.leaves(
        state, is_leaf=lambda x: isinstance(x, Blockwise)
    ))  # fmt: skip


def test_parameters_that_are_called_like_moments_are_not_moments() -> None:
    """The state's own field decides, not a name further down the tree."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Params:
        m: Any
        v: Any

    weights = Params(jnp.ones(2), jnp.ones(2))
    state = quantize_moments(optax.adam(0.1), second="bf16").init(weights).inner
    assert state[0].mu.v.dtype == state[0].mu.m.dtype == jnp.float32
    assert state[0].nu.v.dtype == state[0].nu.m.dtype == jnp.bfloat16
    several = quantize_moments(optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
                               first="int8", second="int8")  # fmt: skip
    assert several.init(weights).inner.acc_grads.v.dtype == jnp.float32  # a gradient has signs
