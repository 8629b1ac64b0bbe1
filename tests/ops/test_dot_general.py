"""Quantised products: what is multiplied, in all three products, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import quantize
from mpjax.formats.delayed import AmaxHistory
from mpjax.ops import conv_general_dilated, dot_general, hadamard, how_it_runs
from mpjax.precision import Operand, Recipe, get_recipe, recipe_names

pytestmark = pytest.mark.usefixtures("fast_compile")

MATRIX = (((1,), (0,)), ((), ()))
CURRENT = [
    name for name in recipe_names() if not get_recipe(name).uses_key and name != "fp8-delayed"
]


def operands(seed: int = 0, m: int = 24, k: int = 40, n: int = 20) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    arrays = rng.normal(size=(m, k)), rng.normal(size=(k, n)), rng.normal(size=(m, n))
    return tuple(jnp.asarray(a, jnp.float32) for a in arrays)  # type: ignore[return-value]


def dequantised(x: Any, operand: Operand | None, axis: int) -> np.ndarray:
    """What an operand becomes, by `quantize`, which has its own oracle in tests/formats."""
    if operand is None:
        return np.asarray(x, np.float64)

    @jax.jit
    def held(x: Any) -> Any:
        f, s, rounding = operand.format, operand.scaling, operand.scales_rounded
        return quantize(x, f, s, axis=axis, scale_rounding=rounding).dequantize(jnp.float32)

    return np.asarray(held(x), np.float64)


def expected(recipe: Recipe, x: Any, w: Any, dy: Any) -> tuple[np.ndarray, ...]:
    """The three products in float64, each operand quantised along the axis that is summed."""
    f, d, g = recipe.fprop, recipe.dgrad, recipe.wgrad
    return (
        dequantised(x, f[0], 1) @ dequantised(w, f[1], 0),
        dequantised(dy, d[0], 1) @ dequantised(w, d[1], 1).T,
        dequantised(x, g[0], 0).T @ dequantised(dy, g[1], 0),
    )


def run(x: Any, w: Any, dy: Any, recipe: Any, dims: Any = MATRIX, **more: Any) -> tuple[Any, ...]:
    @jax.jit
    def all_three(x: Any, w: Any, dy: Any) -> tuple[Any, ...]:
        y, pull = jax.vjp(lambda x, w: dot_general(x, w, dims, recipe, **more), x, w)
        return (y, *pull(dy))

    return all_three(x, w, dy)


@pytest.mark.parametrize("name", [*CURRENT, "emulate(e3m4)", "fixed-q8.8"])
def test_each_product_is_that_of_its_quantised_operands(name: str) -> None:
    recipe = get_recipe(name)
    x, w, dy = operands()
    key = jax.random.key(0) if recipe.uses_key else None
    got = run(x, w, dy, recipe, key=key)
    checked = 1 if recipe.uses_key else 3  # the gradients of fixed point are rounded at random
    for a, b in list(zip(got, expected(recipe, x, w, dy), strict=True))[:checked]:
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_the_oracle_tells_axes_and_formats_apart() -> None:
    x, w, dy = operands(m=72, k=72, n=72)  # more than one block of 32
    right = expected(get_recipe("mxfp8"), x, w, dy)
    for other in ("fp8", "mxfp4", "int8"):
        recipe = get_recipe(other)
        for a, b in zip(right, expected(recipe, x, w, dy), strict=True):
            assert np.abs(a - b).max() > 1e-3 * np.abs(b).max()
    # floats under power-of-two scales round alike along any axis; other formats tell them apart
    for other in ("mxfp4", "int8-switchback"):
        f = get_recipe(other).fprop
        wrong_axis = dequantised(x, f[0], 0) @ dequantised(w, f[1], 1)
        assert np.abs(expected(get_recipe(other), x, w, dy)[0] - wrong_axis).max() > 1e-2


@pytest.mark.parametrize(
    ("shapes", "dims"),
    [
        (((3, 5, 8), (8, 6)), (((2,), (0,)), ((), ()))),
        (((4, 8), (6, 8)), (((1,), (1,)), ((), ()))),
        (((8, 4), (8, 6)), (((0,), (0,)), ((), ()))),
        (((2, 3, 8), (2, 8, 5)), (((2,), (1,)), ((0,), (0,)))),
        (((3, 2, 4, 8), (8, 5, 2, 4)), (((3, 2), (0, 3)), ((1,), (2,)))),
        (((3, 8, 2), (2, 8, 5)), (((1, 2), (1, 0)), ((), ()))),
    ],
)
@pytest.mark.parametrize("name", ["int8", "fp8", "mxfp8"])
def test_any_dimension_numbers(shapes: Any, dims: Any, name: str) -> None:
    """With operands that the formats hold exactly, all is equal to the plain product."""
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.choice([-448.0, 448.0, 0.0], s), jnp.float32) for s in shapes)
    if name == "int8":
        a, b = a / 448 * 127, b / 448 * 127
    plain = lambda a, b: jax.lax.dot_general(a, b, dims, precision="highest")  # noqa: E731
    y, pull = jax.vjp(jax.jit(plain), a, b)
    dy = jnp.sign(y) * (127.0 if name == "int8" else 57344.0 if name == "fp8" else 448.0)
    key = jax.random.key(0)
    got = run(a, b, dy, name, dims, **({"key": key} if get_recipe(name).uses_key else {}))
    for g, want in zip(got, (y, *pull(dy)), strict=True):
        assert g.shape == want.shape
        np.testing.assert_allclose(
            g, want, rtol=1e-5, atol=1e-3 * float(jnp.abs(want).max()) + 1e-9
        )


def test_operands_of_scaled_formats_hold_few_values() -> None:
    from mpjax.ops.products.quantized_operand import quantize_operand

    x = operands(m=256, k=256)[0]
    for name in ("int8", "fp8", "mxfp4"):
        operand = get_recipe(name).fprop[0]
        held = jax.jit(lambda x, o=operand: quantize_operand(x, o, (1,), None, jnp.float32).values)
        values = np.unique(np.asarray(held(x)))
        assert operand is not None and 8 <= len(values) <= 2 ** {"mxfp4": 4}.get(name, 8)
    assert len(np.unique(np.asarray(x))) > 2**15  # what is not quantised holds many


def test_stochastic_gradients_have_the_right_mean_and_nearest_ones_do_not() -> None:
    x, w, _ = operands(m=16, k=16, n=16)
    dy = jnp.full((16, 16), 0.3).at[0, 0].set(127.0)  # 0.3 of a step: nearest rounds it to zero
    exact = np.asarray(dy, np.float64) @ dequantised(w, get_recipe("int8").dgrad[1], 1).T

    def dx(recipe: Any, key: Any) -> Any:
        return run(x, w, dy, recipe, key=key)[1]

    # one scale for the tensor, so that the row without the large number suffers
    row = [Operand("int8"), Operand("int8", "row")]
    random = Recipe("r", tuple(row), (Operand("int8", rounding="stochastic"), row[1]), (None, None))
    plain = Recipe("n", tuple(row), (row[0], row[1]), (None, None))
    keys = jax.random.split(jax.random.key(1), 256)
    many = np.asarray(jax.lax.map(lambda key: dx(random, key), keys))
    error = np.abs(many.mean(0) - exact)[1:]
    assert (error < 5 * many.std(0)[1:] / 256**0.5 + 1e-6).all()
    assert np.abs(np.asarray(dx(plain, None)) - exact)[1:].max() > 0.1
    assert not np.array_equal(many[0], many[1])
    np.testing.assert_array_equal(many[0], np.asarray(dx(random, keys[0])))


def test_hadamard_leaves_the_product_and_spreads_an_outlier() -> None:
    x, _, dy = operands(m=64)
    signs = jax.random.rademacher(jax.random.key(0), (16,), jnp.float32)
    plain = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    turned = hadamard(x, 0, signs), hadamard(dy, 0, signs)
    got = np.asarray(turned[0], np.float64).T @ np.asarray(turned[1], np.float64)
    np.testing.assert_allclose(got, plain, atol=1e-5 * np.abs(plain).max())
    other = hadamard(dy, 0, -jnp.roll(signs, 1).at[0].set(1.0))
    assert np.abs(np.asarray(turned[0]).T @ np.asarray(other) - plain).max() > 0.1
    spike = jnp.zeros((16, 1)).at[3, 0].set(16.0)
    assert float(jnp.abs(hadamard(spike, 0, signs)).max()) == pytest.approx(4.0)


def test_a_running_sum_in_low_precision_loses_what_float32_keeps() -> None:
    ones = jnp.ones((1, 4096)), jnp.ones((4096, 1))
    pair = (None, None)
    low = Recipe("low", pair, pair, pair, accumulate="bfloat16", chunk=1)
    assert dot_general(*ones, MATRIX, low).item() == 256.0  # 256 + 1 is 256 in bfloat16
    chunked = Recipe("chunked", pair, pair, pair, accumulate="bfloat16", chunk=128)
    assert dot_general(*ones, MATRIX, chunked).item() == 4096.0
    assert dot_general(*ones, MATRIX, Recipe("wide", pair, pair, pair)).item() == 4096.0
    x, w, dy = operands(k=130)
    for a, b in zip(run(x, w, dy, low), expected(low, x, w, dy), strict=True):
        np.testing.assert_allclose(np.asarray(a), b, atol=0.1 * np.abs(b).max())


def test_int8_sums_beyond_int32_are_not_native() -> None:
    recipe = get_recipe("int8")
    assert how_it_runs(recipe, "cpu", 131_071)["fprop"] == "native int8 product"
    assert how_it_runs(recipe, "cpu", 140_000)["fprop"].startswith("emulated")
    n = 140_000
    x, w = jnp.full((1, n), 127.0), jnp.full((n, 1), 127.0)
    got = dot_general(x, w, MATRIX, "int8", key=jax.random.key(0)).item()
    assert got == pytest.approx(127.0**2 * n, rel=1e-5)
    wrapped = np.full(n, 127 * 127, np.int32).sum(dtype=np.int32)  # what int32 would make of it
    assert wrapped < 0


@pytest.mark.parametrize("where", ["x", "w", "dy"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", ["fp8", "mxfp8", "nvfp4", "int8", "emulate(int8)", "emulate(e5m2)", "fixed-q4.4"]
)
def test_what_is_not_finite_is_not_hidden(name: str, bad: float, where: str) -> None:
    arrays = dict(zip(("x", "w", "dy"), operands(), strict=True))
    arrays[where] = arrays[where].at[0, 0].set(bad)
    y, dx, dw = run(*arrays.values(), name, key=jax.random.key(0))
    touched = {"x": (y, dw), "w": (y, dx), "dy": (dx, dw)}[where]
    assert not any(bool(jnp.isfinite(out).all()) for out in touched)


def test_a_margin_leaves_room_above_the_history() -> None:
    x, w, _ = operands()
    plain = get_recipe("fp8-delayed")
    roomy = dataclasses.replace(plain, name="roomy", margin=3)
    seen = AmaxHistory.empty(plain.history)
    _, seen = dot_general(x, w, MATRIX, plain, amax=seen)
    history = seen.end(AmaxHistory.empty(plain.history), jnp.ones(3), jnp.float32(1))
    errors = [
        float(jnp.abs(dot_general(8 * x, w, MATRIX, r, amax=history)[0] - 8 * x @ w).max())
        for r in (plain, roomy)
    ]
    assert errors[1] < 0.2 * errors[0], errors  # without a margin all that is above saturates


@pytest.mark.parametrize("name", ["mxfp8", "fp8-block", "nvfp4", "int8"])
def test_a_vector_has_no_axis_left_to_block(name: str) -> None:
    x, w, _ = operands()
    key = jax.random.key(0)
    by_vector = jax.grad(
        lambda x, v: dot_general(x, v, MATRIX, name, key=key).sum(), argnums=(0, 1)
    )
    dx, dv = by_vector(x, w[:, 0])
    np.testing.assert_allclose(dx, jnp.broadcast_to(w[:, 0], x.shape), rtol=0.5, atol=0.5)
    np.testing.assert_allclose(dv, x.sum(0), rtol=0.5, atol=0.1 * float(jnp.abs(x).sum(0).max()))


@pytest.mark.parametrize("name", ["bfloat16", "tf32", "float32"])
def test_wide_formats_do_not_overflow_between_their_scales(name: str) -> None:
    x, w, _ = operands()
    wide = Recipe("wide", *(3 * [(Operand(name), Operand(name))]))
    np.testing.assert_allclose(dot_general(x, w, MATRIX, wide), x @ w, rtol=0.02, atol=0.05)


def test_keys_of_any_kind_draw() -> None:
    x, w, dy = operands()
    found = [
        run(x, w, dy, "int8", key=key)[1]
        for key in (jax.random.key(0), jax.random.PRNGKey(0), jax.random.key(0, impl="rbg"))
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert bool(jnp.isfinite(found[2]).all()) and bool((found[0] != found[2]).any())


def test_a_recipe_of_lists_is_that_of_tuples() -> None:
    plain, (x, w, dy) = get_recipe("fp8-row"), operands()
    listed = dataclasses.replace(plain, fprop=list(plain.fprop), dgrad=list(plain.dgrad))
    assert listed == plain and hash(listed) == hash(plain)
    for got, want in zip(run(x, w, dy, listed), run(x, w, dy, plain), strict=True):
        np.testing.assert_array_equal(got, want)


# --- convolutions -------------------------------------------------------------------------------


def test_convolution_is_that_of_its_quantised_operands_and_so_are_its_gradients() -> None:
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(2, 7, 6, 4)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(3, 3, 4, 5)), jnp.float32)
    plain = lambda x, k: jax.lax.conv_general_dilated(  # noqa: E731
        x, k, (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )
    ours = lambda x, k: conv_general_dilated(x, k, (2, 1), "SAME", "fp8-row")  # noqa: E731
    y, pull = jax.vjp(jax.jit(ours), x, k)
    dy = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    dx, dk = pull(dy)
    o = get_recipe("fp8-row").fprop[0]
    assert o is not None

    def q(a: Any, axes: tuple[int, ...]) -> Any:
        return quantize(a, o.format, "row", axis=axes, scale_rounding="up").dequantize()

    want = plain(q(x, (1, 2, 3)), q(k, (0, 1, 2)))
    want_dx = jax.vjp(lambda x: plain(x, q(k, (0, 1, 3))), x)[1](q(dy, (1, 2, 3)))[0]
    want_dk = jax.vjp(lambda k: plain(q(x, (0, 1, 2)), k), k)[1](q(dy, (0, 1, 2)))[0]
    for got, right in ((y, want), (dx, want_dx), (dk, want_dk)):
        np.testing.assert_allclose(got, right, atol=1e-5 * float(jnp.abs(right).max()))
    assert float(jnp.abs(y - plain(x, k)).max()) > 1e-2  # it does quantise


def test_a_one_by_one_convolution_is_a_product() -> None:
    x, w, _ = operands(m=12)
    y = conv_general_dilated(x.reshape(1, 3, 4, -1), w[None, None], (1, 1), "VALID", "mxfp8")
    want = dot_general(x, w, MATRIX, "mxfp8")
    np.testing.assert_allclose(y.reshape(12, -1), want, atol=1e-5)


def test_blocks_lie_along_the_channels_in_any_layout() -> None:
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(2, 5, 6, 64)), jnp.float32)
    k = jnp.asarray(rng.normal(size=(3, 3, 64, 32)), jnp.float32)

    def other(x: Any, k: Any) -> Any:
        y = conv_general_dilated(
            x.transpose(0, 3, 1, 2), k.transpose(3, 2, 0, 1), (1, 1), "SAME", "mxfp8",
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )  # fmt: skip
        return y.transpose(0, 2, 3, 1)

    usual = lambda x, k: conv_general_dilated(x, k, (1, 1), "SAME", "mxfp8")  # noqa: E731
    (y, pull), (z, other_pull) = jax.vjp(usual, x, k), jax.vjp(other, x, k)
    dy = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    for got, want in ((z, y), (other_pull(dy)[0], pull(dy)[0])):
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


# --- bad input ----------------------------------------------------------------------------------


def test_mistakes_are_named() -> None:
    x, w, dy = operands()
    cases = [
        (lambda: dot_general(x, w, MATRIX, "fp9"), "unknown recipe 'fp9'; did you mean fp8"),
        (lambda: dot_general(x, w, MATRIX, "emulate(e9)"), "format: unknown name 'e9'"),
        (lambda: dot_general(x.astype(jnp.int32), w, MATRIX, "fp8"), "the left one is int32"),
        (lambda: dot_general(x.astype(jnp.float8_e4m3fn), w, MATRIX, "fp8"), "one is float8_e4m3"),
        (lambda: dot_general(x, w, MATRIX, "fp8-delayed"), "has no state; pass amax="),
        (
            lambda: dot_general(x, w, MATRIX, "fp8", amax=AmaxHistory.empty(4)),
            "keeps no amax history",
        ),
        (lambda: run(x, w, dy, "int8"), "'int8' draws random numbers .* has no key"),
        (lambda: run(x, w, dy, "nvfp4", where="decoder/up"), "decoder/up: recipe 'nvfp4' draws"),
        (
            lambda: conv_general_dilated(x[None, None], w[None, None], (1, 1), "VALID", "nvfp4"),
            "a convolution does not take",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    dot_general(x, w, MATRIX, "int8")  # forward alone draws nothing and needs no key
