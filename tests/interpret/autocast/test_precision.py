"""What autocast takes: dtypes, presets, Precisions, recipes under float32, random keys."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from mpjax.errors import ConfigError
from mpjax.precision.presets import preset_names

pytestmark = pytest.mark.usefixtures("fast_compile")

W = jax.random.normal(jax.random.key(0), (32, 32))
X = jax.random.normal(jax.random.key(1), (4, 32))


def _model(w: Any, x: Any) -> Any:
    with jax.named_scope("mlp"):
        h = jnp.tanh(x @ w / 4)
    with jax.named_scope("head"):
        return h @ w.T


def _exact() -> tuple[np.ndarray, np.ndarray]:
    w, x = np.asarray(W, np.float64), np.asarray(X, np.float64)
    return np.tanh(x @ w / 4), np.tanh(x @ w / 4) @ w.T


def _off(found: Any, exact: Any) -> float:
    a, b = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("value", ["fp32", "float32", jnp.float32, "O0", "p=f32,c=f32,o=f32"])
def test_float32_is_the_function_itself(value: Any) -> None:
    jaxpr = jax.make_jaxpr(_model)(W, X)
    assert str(jax.make_jaxpr(mpjax.autocast(_model, value))(W, X)) == str(jaxpr)


@pytest.mark.parametrize("recipe, bits", [("fp8", 3), ("mxfp8", 3), ("int8", 6), ("fp8-row", 3)])
@pytest.mark.parametrize("rule", ["**", "**/mlp"])
def test_quantised_products_in_a_float32_function(recipe: str, bits: int, rule: str) -> None:
    low = mpjax.autocast(_model, "fp32", rules=[f"{rule}=r={recipe}"])
    found, exact = low(W, X), _exact()[1]
    assert found.dtype == jnp.float32
    assert 2.0 ** -(bits + 3) < _off(found, exact) < 2.0**-bits
    # Nothing is rounded to 16 bits: the product alone gives the same.
    dims = (((1,), (0,)), ((), ()))
    h = jnp.tanh(mpjax.dot_general(X, W, dims, recipe) / 4)
    dims = (((1,), (1 if rule == "**/mlp" else 0,)), ((), ()))
    if rule == "**/mlp":
        np.testing.assert_allclose(found, h @ W.T, rtol=1e-5, atol=1e-5)
        assert mpjax.audit(low, W, X).by_path["head"].keys() == {"float32"}


def test_some_paths_low_in_a_float32_function() -> None:
    low = mpjax.autocast(_model, "fp32", rules=["**/mlp=bf16"])
    by_path = mpjax.audit(low, W, X).by_path
    assert by_path["mlp"]["bfloat16"].products and by_path["head"].keys() == {"float32"}
    assert 2.0**-12 < _off(low(W, X), _exact()[1]) < 2.0**-8


def test_a_recipe_in_a_float32_region_is_used() -> None:
    rules = ["**/mlp=p=f32,c=f32,o=f32,r=fp8"]
    report = mpjax.audit(mpjax.autocast(_model, "bf16", rules=rules), W, X, platform="cuda")
    assert report.by_path["mlp"]["float8_e4m3fn"].products


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_by_name_and_as_a_precision(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    precision = mpjax.get_precision(name)
    parts = ("loss_scale", "update", "moments", "gradient_dtype")
    plain = mpjax.get_precision("fp32")
    mine = [part for part in parts if getattr(precision, part) != getattr(plain, part)]
    with caplog.at_level(logging.WARNING, "mpjax.interpret"):
        low = mpjax.autocast(_model, precision)
    assert len(caplog.messages) == bool(mine)
    for part in mine:
        assert part in caplog.text and "mpjax.optim.wrap(optimizer, precision)" in caplog.text
    if name == "fp8-delayed":
        with pytest.raises(ConfigError, match="state is None; give what init_state"):
            jax.eval_shape(low, W, X)
        return
    jaxpr = str(jax.make_jaxpr(low)(W, X))
    if name not in ("bf16", "fp16"):  # as texts these are dtypes, without a preset's rules by path
        assert str(jax.make_jaxpr(mpjax.autocast(_model, name))(W, X)) == jaxpr


def test_a_recipe_that_draws_takes_a_key() -> None:
    def loss(w: Any, key: Any = None, base: str = "bf16") -> Any:
        return mpjax.autocast(_model, base, rules=["**=r=int8"], key=key)(w, X).sum()

    with pytest.raises(ConfigError, match="autocast: .*'int8' draws .* pass key="):
        jax.grad(loss)(W)
    w, x = np.asarray(W, np.float64), np.asarray(X, np.float64)
    h, ones = _exact()[0], np.ones((4, 32))
    exact = ones.T @ h + x.T @ ((ones @ w) * (1 - h**2) / 4)
    for base in ("bf16", "fp32"):
        step = jax.jit(lambda key, base=base: jax.grad(loss)(W, key, base))
        keys = jax.random.split(jax.random.key(3), 24)
        each = np.stack([step(key) for key in keys])
        assert np.ptp(each, axis=0).max() > 0  # it draws
        # without a bias: means over a dozen keys are a third as far apart as two draws
        assert _off(each[:12].mean(0), each[12:].mean(0)) < 0.5 * _off(each[0], each[12])
        assert _off(each.mean(0), exact) < 2.0**-5
        np.testing.assert_array_equal(step(keys[0]), each[0])
    assert np.isfinite(
        mpjax.autocast(_model, "bf16", rules=["**=r=nvfp4"], key=jax.random.key(0))(W, X)
    ).all()


@pytest.mark.parametrize("value", ["int4", "e4m3", "float31", 3])
def test_what_autocast_does_not_compute_in(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        mpjax.autocast(_model, value)
    assert len(str(caught.value).splitlines()) == 1
