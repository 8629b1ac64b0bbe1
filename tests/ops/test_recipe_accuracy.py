"""What recipes lose in their products against float64, on normal data and with outlier channels."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.formats import Format
from mpjax.ops import dot_general
from mpjax.ops.products.quantized_operand import QuantizedOperand, opened, quantize_operand
from mpjax.precision import Recipe, get_recipe, recipe_names

pytestmark = pytest.mark.usefixtures("fast_compile")

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments" / "common"
MODULE = importlib.import_module("mpjax.ops.products.dot_general")  # the function has its name
MATMUL = (((1,), (0,)), ((), ()))


def _experiment(name: str) -> Any:
    """A module of the experiments, whose folder is no package."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


error = _experiment("product_error")


def is_eight_bit(name: str) -> bool:
    return {Format(o.format).bits for o in get_recipe(name).operands} == {8}


EIGHT = [name for name in recipe_names() if is_eight_bit(name)]


def ratios(name: str) -> dict[str, float]:
    """SQNR of each product; `benchmarks/numerics/recipes.py` measures many lengths."""
    found = error.against_length([name], (256,), 16, jnp.float32)
    return {r["product"]: r["sqnr"] for r in found}


# Normal data.


def test_there_are_eight_bit_recipes() -> None:
    assert {"fp8", "fp8-delayed", "fp8-block", "mxfp8", "int8", "int8-switchback"} <= set(EIGHT)


@pytest.mark.parametrize("name", EIGHT)
def test_eight_bits_keep_20_db_in_all_three_products(name: str) -> None:
    found = ratios(name)
    assert len(found) == 3 and min(found.values()) > 20
    assert found["output"] < 60, "it quantises: float32 would be above 100 dB"


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_four_bits_do_not(name: str) -> None:
    assert max(ratios(name).values()) < 20


def test_without_scales_small_gradients_are_lost() -> None:
    found = ratios("emulate(e4m3)")
    assert found["dgrad"] < 1 and found["wgrad"] < 1
    assert ratios("emulate(e6m3)")["dgrad"] > 20, "it was the range, not the figures"


def test_the_error_of_nothing_is_seen_too() -> None:
    assert min(ratios("not-quantised").values()) > 100
    exact = np.ones(4)
    assert error.decibels(exact, exact * 0.9) == pytest.approx(20)
    assert error.decibels(exact, exact) == np.inf


@pytest.mark.parametrize("name", ["fp8-block", "mxfp8", "nvfp4", "int8-switchback"])
def test_zeros_at_the_end_are_a_shorter_product(name: str) -> None:
    recipe = get_recipe(name)
    x, w, dy = error.operands(np.random.default_rng(0), 8, 256, 8)
    short = [x[:, :48], w[:48], dy]
    padded = [error.shortened(x, 256, 48), error.shortened(w, 256, 48), dy]
    both = [
        error.products(recipe, jnp.float32)(*data, jax.random.key(0), error.largest(x, w, dy))[0]
        for data in (short, padded)
    ]
    np.testing.assert_allclose(both[0], both[1], rtol=1e-5, atol=1e-6)


# The operands that are multiplied.


@pytest.mark.parametrize("name", recipe_names())
def test_operands_hold_at_most_two_to_the_bits(name: str) -> None:
    found = error.distinct([name], 2**14, jnp.float32)
    assert [r["operand"] for r in found] == ["x", "W", "dy", "W", "x", "dy"]
    for record in found:
        if record["limit"] is None:
            assert record["count"] > 10_000, "float32 operands, which the check would catch"
        else:
            assert 4 <= record["count"] <= record["limit"]


# Rounded to nearest, so that an operand quantised twice is the same.
DEFINITE = ["fp8", "fp8-block", "int8-block"]


def _distance(name: str) -> list[float]:
    """How far the three products are from those of the operands that `distinct` counts."""
    recipe = error.find(name)
    # columns differ in size, so that quantising along another axis shows
    x, w, dy = error.operands(np.random.default_rng(3), 160, 144, 136)
    x *= 2.0 ** np.linspace(0, 8, 144, dtype=np.float32)
    w *= 2.0 ** np.linspace(0, 8, 136, dtype=np.float32)
    dy *= 2.0 ** np.linspace(0, 8, 136, dtype=np.float32)

    def held(v: Any, operand: Any, axis: int) -> np.ndarray:
        one = jax.jit(lambda v: opened(quantize_operand(v, operand, (axis,), None, jnp.float32)))
        return np.asarray(one(v), np.float64)

    exact = (
        held(x, recipe.fprop[0], 1) @ held(w, recipe.fprop[1], 0),
        held(dy, recipe.dgrad[0], 1) @ held(w, recipe.dgrad[1], 1).T,
        held(x, recipe.wgrad[0], 0).T @ held(dy, recipe.wgrad[1], 0),
    )
    got = error.products(recipe, jnp.float32)(x, w, dy, None, error.largest(x, w, dy))
    return [
        float(np.linalg.norm(np.asarray(g, np.float64) - e) / np.linalg.norm(e))
        for e, g in zip(exact, got, strict=True)
    ]


@pytest.mark.parametrize("name", DEFINITE)
def test_the_counted_operands_are_those_that_are_multiplied(name: str) -> None:
    assert max(_distance(name)) < 2e-6


@pytest.fixture
def swap_quantize(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """Puts another `quantize_operand` into products, and forgets those traced with the real one."""

    def swap(other: Any) -> None:
        monkeypatch.setattr(MODULE, "quantize_operand", other)
        _forget()

    yield swap
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    for traced in (MODULE._multiply, MODULE._pull_back):
        traced.clear_cache()


def test_operands_that_are_not_quantised_are_noticed(swap_quantize: Any) -> None:
    def wide(
        x: Any, operand: Any, axes: Any, key: Any, compute: Any, *known: Any
    ) -> QuantizedOperand:
        return quantize_operand(x, None, axes, key, compute)

    swap_quantize(wide)
    assert min(_distance("fp8-block")) > 1e-3


def _other_axis(backward_only: bool) -> Any:
    """A `quantize_operand` that quantises along the axis that is not summed over."""
    calls: list[Any] = []

    def wrong(
        x: Any, operand: Any, axes: Any, key: Any, compute: Any, *known: Any
    ) -> QuantizedOperand:
        calls.append(axes)
        if len(calls) > 2 or not backward_only:  # the first two are the forward product's
            axes = (1 - axes[0],)
        return quantize_operand(x, operand, axes, key, compute, *known)

    return wrong


def test_a_backward_pass_along_the_wrong_axis_is_noticed(swap_quantize: Any) -> None:
    swap_quantize(_other_axis(backward_only=True))
    # not mxfp8: with power-of-two scales a float is rounded alike along either axis
    output, dgrad, wgrad = _distance("int8-block")
    assert output < 2e-6 < 1e-3 < min(dgrad, wgrad)


# Outlier channels.

OUTLIERS = error.Outliers((1.0, 100.0, 1e4), tokens=256, channels=1024, outputs=16, seeds=2)


@pytest.fixture(scope="module")
def outliers() -> dict[tuple[str, str, float], float]:
    names = ("int8-tensor", "int8-block", "e4m3-tensor", "e4m3-block")
    found: dict[tuple[str, str, float], list[float]] = {}
    for r in error.with_outliers(names, OUTLIERS, jnp.float32):
        found.setdefault((r["recipe"], r["place"], r["size"]), []).append(r["sqnr"])
    return {key: float(np.mean(values)) for key, values in found.items()}


def gain(found: Any, format: str, place: str, size: float) -> float:
    return found[f"{format}-block", place, size] - found[f"{format}-tensor", place, size]


@pytest.mark.parametrize("place", ["x in wgrad", "wgrad", "wgrad, ordinary"])
def test_int8_blocks_beat_a_scale_for_the_tensor(outliers: Any, place: str) -> None:
    assert gain(outliers, "int8", place, 100.0) >= 10
    assert gain(outliers, "int8", place, 1.0) < 6, "it is the outliers that make the difference"


def test_e4m3_blocks_keep_the_ordinary_channels(outliers: Any) -> None:
    for place in ("x in output, ordinary", "x in wgrad, ordinary", "wgrad, ordinary"):
        assert gain(outliers, "e4m3", place, 1e4) >= 3, place
        assert abs(gain(outliers, "e4m3", place, 100.0)) < 1, "e4m3's range holds 100x anyway"


def test_blocks_along_the_wrong_axis_lose_the_ordinary_channels(
    outliers: Any, swap_quantize: Any
) -> None:
    right = outliers["int8-block", "wgrad, ordinary", 100.0]
    swap_quantize(_other_axis(backward_only=False))
    one = error.Outliers((100.0,), tokens=256, channels=1024, outputs=16, seeds=1)
    found = error.with_outliers(("int8-block",), one, jnp.float32)
    (wrong,) = [r["sqnr"] for r in found if r["place"] == "wgrad, ordinary"]
    assert wrong < right - 10


@pytest.mark.parametrize("placement", ["random", "even", "together"])
def test_one_in_so_many_channels_is_an_outlier(placement: str) -> None:
    chosen = error.Outliers(placement=placement).choose(np.random.default_rng(0))
    assert len(set(chosen)) == 2048 // 64 and 0 <= min(chosen) <= max(chosen) < 2048


# The Hadamard transform of wgrad's operands.


@pytest.mark.parametrize("tokens", [512, 500])
def test_the_hadamard_transform_leaves_the_product(tokens: int) -> None:
    assert error.hadamard_error(tokens) < 1e-5
    assert error.hadamard_error(tokens, same=False) > 0.5, "with other signs it does not"


def test_a_recipe_that_only_transforms_leaves_wgrad() -> None:
    bare = Recipe("bare", (None, None), (None, None), (None, None), hadamard=16)
    x, w, dy = map(jnp.asarray, error.operands(np.random.default_rng(5), 100, 24, 8))

    def weight_gradient(recipe: Any, key: Any) -> Any:
        run = lambda w: dot_general(x, w, MATMUL, recipe, key=key)  # noqa: E731
        return np.asarray(jax.vjp(run, w)[1](dy)[0], np.float64)

    exact = np.asarray(x, np.float64).T @ np.asarray(dy, np.float64)
    size = np.linalg.norm(exact)
    plain = weight_gradient("emulate(float32)", None)
    turned = [weight_gradient(bare, jax.random.key(seed)) for seed in (0, 1)]
    assert np.linalg.norm(plain - exact) / size < 1e-6
    assert all(np.linalg.norm(t - exact) / size < 1e-5 for t in turned)
    assert not np.array_equal(turned[0], turned[1]), "the signs are drawn, and used"
