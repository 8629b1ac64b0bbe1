"""What is saved for the backward pass: the forward pass is the same, gradients are those of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mpjax import ops
from mpjax.errors import ConfigError
from mpjax.formats import Quantized
from mpjax.formats.delayed import AmaxHistory
from mpjax.ops import Saved, from_saved, known_scales, save_for_backward
from mpjax.precision import Operand, Residuals, get_recipe, parse_policy

E4M3 = Residuals("e4m3")
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(6, 256)), jnp.bfloat16)
W = jnp.asarray(RNG.normal(size=(256, 32)) / 16, jnp.float32)
DY = jnp.asarray(RNG.normal(size=(6, 32)), jnp.bfloat16)
F32 = parse_policy("f32")


def rounded(x: Any, block: int) -> np.ndarray:
    """Blocks of the last axis as e4m3 with a scale of amax / 448, by ml_dtypes."""
    parts = np.asarray(x, np.float32).reshape(*x.shape[:-1], -1, block)
    scales = np.abs(parts).max(-1, keepdims=True).astype(np.float32) / np.float32(448)
    inverse = np.float32(1) / scales
    return ((parts * inverse).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales).reshape(
        x.shape
    )


@pytest.mark.parametrize(("block", "used"), [(128, 128), (64, 64), (100, 64), (512, 256), (8, 8)])
def test_blocks_are_those_of_ml_dtypes(block: int, used: int) -> None:
    x = X.astype(jnp.float32)
    saved = save_for_backward(x, Residuals("e4m3", block))
    np.testing.assert_allclose(saved.restored(), rounded(X, used), rtol=3e-7)
    assert saved.low is not None and saved.low.values.dtype == jnp.float8_e4m3fn


@pytest.mark.parametrize(
    ("size", "parts", "tile"), [(11008, 8, 86), (11008, 1, 128), (257, 1, 257), (2 * 127, 2, 127)]
)
def test_no_block_lies_on_two_devices(size: int, parts: int, tile: int) -> None:
    low = save_for_backward(jnp.ones((1, size)), E4M3, parts=parts).low
    assert isinstance(low, Quantized) and low.tile[-1] == tile and size // parts % tile == 0


def test_a_format_that_no_dtype_holds_is_not_kept_in_32_bits() -> None:
    low = save_for_backward(X, E4M3, Operand("q4.4", "none")).low
    assert isinstance(low, Quantized) and low.values.dtype.itemsize == 1


def test_what_saves_nothing_is_kept_as_it_is() -> None:
    for x, text in [(X, "none"), (X, "bf16"), (X, "f16"), (jnp.arange(3), "e4m3")]:
        assert save_for_backward(x, Residuals.parse(text)).low is None
    assert save_for_backward(W, Residuals("bf16")).restored().dtype == jnp.float32


def multiplied(x: jax.Array, w: jax.Array) -> jax.Array:
    return ops.linear(x, w, parse_policy("c=bf16"))


@pytest.mark.parametrize("text", ["bf16", "e4m3", "e5m2@64", "int8"])
def test_a_product_reads_what_was_kept_and_its_result_does_not(text: str) -> None:
    x = X.astype(jnp.float32)
    saved = save_for_backward(x, Residuals.parse(text))

    def by(x: jax.Array, w: jax.Array) -> jax.Array:
        return from_saved(multiplied, (save_for_backward(x, Residuals.parse(text)),), w)

    y, pull = jax.vjp(by, x, W)
    plain, plain_pull = jax.vjp(multiplied, x, W)
    np.testing.assert_array_equal(y, plain)
    dx, dw = pull(DY.astype(y.dtype))
    np.testing.assert_array_equal(dx, plain_pull(DY.astype(y.dtype))[0])  # it reads no x
    kept = np.asarray(saved.restored().astype(jnp.bfloat16), np.float64)
    want = kept.T @ np.asarray(DY, np.float64)
    np.testing.assert_allclose(dw, want, atol=1e-5 * np.abs(want).max())
    if text != "bf16":  # which the product's operands are anyway
        other = np.asarray(x, np.float64).T @ np.asarray(DY, np.float64)
        assert np.abs(dw - other).max() > 1e-3 * np.abs(want).max()


def test_a_norm_has_the_gradient_at_what_was_kept() -> None:
    x, dy = np.asarray(X, np.float64), np.asarray(RNG.normal(size=X.shape))
    norm = functools.partial(ops.norm, policy=F32, centre=False, epsilon=1e-5)

    def by(x: jax.Array, scale: jax.Array) -> jax.Array:
        return from_saved(norm, (save_for_backward(x, E4M3),), scale, None)

    scale = jnp.asarray(RNG.normal(size=256), jnp.float32)
    y, pull = jax.vjp(by, jnp.asarray(x, jnp.float32), scale)
    kept = rounded(X, 128).astype(np.float64)
    root = np.sqrt((kept**2).mean(-1, keepdims=True) + 1e-5)
    normal, g = kept / root, dy * np.asarray(scale, np.float64)
    dx, dscale = pull(jnp.asarray(dy, jnp.float32))
    want = (g - normal * (g * normal).mean(-1, keepdims=True)) / root
    np.testing.assert_allclose(dx, want, atol=2e-6)
    np.testing.assert_allclose(dscale, (dy * normal).sum(0), atol=2e-5)
    exact = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale)
    np.testing.assert_allclose(y, exact, atol=2e-6)  # the forward pass reads x itself


@pytest.mark.parametrize("recipe", ["fp8", "fp8-block"])
def test_a_product_in_8_bits_keeps_the_numbers_that_it_multiplies(recipe: str) -> None:
    """So where wgrad quantises x as the forward pass did, its bits are the same; else close."""
    chosen = get_recipe(recipe)

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return ops.linear(x, w, parse_policy("c=bf16"), recipe=chosen)

    def by(x: jax.Array, w: jax.Array) -> jax.Array:
        return from_saved(product, (save_for_backward(x, E4M3, chosen.fprop[0]),), w)

    def general(x: jax.Array, w: jax.Array) -> jax.Array:
        return from_saved(product, (save_for_backward(x, E4M3),), w)

    x = jnp.asarray(RNG.normal(size=(128, 256)), jnp.bfloat16)
    dy = jnp.asarray(RNG.normal(size=(128, 32)), jnp.bfloat16)
    found = [jax.vjp(f, x, W)[1](dy)[1] for f in (product, by, general)]
    want, ours, twice = (np.asarray(dw) for dw in found)
    if recipe == "fp8":
        np.testing.assert_array_equal(ours, want)
        assert (twice != want).any()
    assert np.linalg.norm(ours - want) < 0.05 * np.linalg.norm(want)


@pytest.mark.parametrize("wanted", ["weights", "input"])
def test_a_second_derivative_is_one_line(wanted: str) -> None:
    def total(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(from_saved(lambda x, w: jnp.tanh(x @ w), (save_for_backward(x, E4M3),), w))

    x, number = X.astype(jnp.float32), int(wanted == "weights")
    assert jnp.isfinite(jax.grad(total, number)(x, W)).all()
    with pytest.raises(ConfigError, match="residuals: gradients of gradients.*residuals=none"):
        jax.grad(lambda *a: jnp.sum(jax.grad(total, number)(*a) ** 2), number)(x, W)


def test_a_number_among_the_arguments_stays_one() -> None:
    def f(x: jax.Array, first: int) -> jax.Array:
        return x * 2 if first == 0 else x  # a traced number could not be asked

    out = jax.jit(jax.grad(lambda x: jnp.sum(from_saved(f, (save_for_backward(x, E4M3),), 0))))(W)
    assert float(out[0, 0]) == 2.0
    assert from_saved(f, (Saved(W),), 1) is W


@pytest.mark.parametrize(
    ("recipe", "left", "right"),
    [("fp8", True, True), ("int8", False, False),
     ("mxfp8", False, False), ("fp8-block", False, False), (None, False, False)],
)  # fmt: skip
def test_scales_are_known_where_both_passes_share_them(
    recipe: str | None, left: bool, right: bool
) -> None:
    chosen = None if recipe is None else get_recipe(recipe)
    saved = save_for_backward(X, E4M3, chosen.fprop[0] if chosen else None)
    x, w = known_scales(saved, W, chosen, jnp.bfloat16)
    assert (x is not None, w is not None) == (left, right)
    assert known_scales(Saved(X), W, chosen, jnp.bfloat16) == (None, None)  # nothing is kept
    if chosen is not None and x is not None and w is not None:
        for scale, of in ((x, X), (w, W)):
            want = np.abs(np.asarray(of, np.float32)).max() / np.float32(448)
            np.testing.assert_allclose(float(scale), want, rtol=1e-6)
        other = save_for_backward(X, Residuals("e5m2"))  # not the numbers that are multiplied
        assert known_scales(other, W, chosen, jnp.bfloat16)[0] is None


def test_under_delayed_scaling_a_scale_comes_from_the_history() -> None:
    recipe = get_recipe("fp8-delayed")
    amax = AmaxHistory.empty(4)._replace(amax=jnp.array([3.0, 0.0, 0.0]))
    saved = save_for_backward(X, E4M3, recipe.fprop[0])
    x, w = known_scales(saved, W, recipe, jnp.bfloat16, amax)
    assert x is not None and w is not None
    np.testing.assert_allclose(float(x), 3 * 2.0**recipe.margin / 448, rtol=1e-6)
    np.testing.assert_allclose(float(w), np.abs(np.asarray(W)).max() / 448, rtol=1e-6)
    full = save_for_backward(X.at[0, 0].set(jnp.inf), E4M3, recipe.fprop[0])
    assert np.isnan(float(known_scales(full, W, recipe, jnp.bfloat16, amax)[0]))  # type: ignore[arg-type]


def test_a_known_scale_changes_no_bit() -> None:
    chosen = get_recipe("fp8")
    saved = save_for_backward(X, E4M3, chosen.fprop[0])
    scales = known_scales(saved, W, chosen, jnp.bfloat16)

    def found(scales: Any) -> list[np.ndarray]:
        def product(x: jax.Array, w: jax.Array) -> jax.Array:
            return ops.linear(x, w, parse_policy("c=bf16"), recipe=chosen, scales=scales)

        y, pull = jax.vjp(product, X, W)
        return [np.asarray(v, np.float32) for v in (y, *pull(DY.astype(y.dtype)))]

    for ours, want in zip(found(scales), found((None, None)), strict=True):
        np.testing.assert_array_equal(ours, want)
    larger = found(tuple(3 * s for s in scales if s is not None))
    assert all((a != b).any() for a, b in zip(larger, found(scales), strict=True))  # they are read
