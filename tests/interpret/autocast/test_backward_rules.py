"""Recipes in backward rules that someone wrote; right is the gradient that the recipe gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from mpjax.errors import ConfigError
from mpjax.interpret.autocast import products

pytestmark = pytest.mark.usefixtures("fast_compile")
Pair = tuple[Any, Any]


def in_scan(w: Any, x: Any) -> Any:
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=3)[0]


def in_cond(w: Any, x: Any) -> Any:
    return jax.lax.cond(x[0, 0] > 0, lambda c: jnp.tanh(c @ w), lambda c: c @ w, x)


def plain(w: Any, x: Any) -> Any:
    return x @ w


def through_vjp(core: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a rule that differentiates inside, as a checkpointed loop's does."""
    function = jax.custom_vjp(core)
    function.defvjp(lambda w, x: (core(w, x), (w, x)), lambda r, dy: jax.vjp(core, *r)[1](dy))
    return function


def by_hand(_: Callable[..., Any]) -> Callable[..., Any]:
    """x W with its rule written out; gradients stand left in one product and right in the other."""
    function = jax.custom_vjp(plain)
    function.defvjp(lambda w, x: (x @ w, (w, x)), lambda r, dy: (r[1].T @ dy, dy @ r[0].T))
    return function


def gradients(function: Callable[..., Any], recipe: str) -> Pair:
    def loss(w: Any, x: Any) -> Any:
        return jnp.sum(function(w, x) ** 2)

    w, x = jax.random.normal(jax.random.key(0), (16, 16)) / 4, jnp.ones((4, 16))
    x = x + jax.random.normal(jax.random.key(1), (4, 16))
    low = mpjax.autocast(loss, "fp32", rules=[f"**=r={recipe}"])
    return jax.jit(jax.grad(low, (0, 1)))(w, x)


@pytest.mark.parametrize("recipe", ["fp8", "mxfp8"])
@pytest.mark.parametrize(
    ("rule", "core"),
    [(through_vjp, in_scan), (through_vjp, in_cond), (through_vjp, plain), (by_hand, plain)],
)
def test_a_written_rule_quantises_as_the_recipe_itself(rule: Any, core: Any, recipe: str) -> None:
    for mine, right in zip(gradients(rule(core), recipe), gradients(core, recipe), strict=True):
        np.testing.assert_allclose(mine, right, rtol=2e-5, atol=1e-6)


def test_forward_formats_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right, _ = gradients(in_scan, "fp8")
    monkeypatch.setattr(products, "of_sides", lambda recipe, sides: recipe)
    mine, _ = gradients(through_vjp(in_scan), "fp8")
    assert float(jnp.max(jnp.abs(mine - right))) > 1e-3


def test_a_gradient_that_is_traced_already_is_still_refused() -> None:
    w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    low = mpjax.autocast(jax.grad(lambda w: plain(w, x).sum()), "fp32", rules=["**=r=fp8"])
    with pytest.raises(ConfigError, match=r"write jax.grad\(mpjax.autocast"):
        low(w)


def test_a_derivative_inside_names_the_rule_that_leaves_it_out() -> None:
    def flow(w: Any, x: Any) -> Any:
        with jax.named_scope("flow"):
            y, pull = jax.vjp(lambda x: jnp.tanh(x @ w), x)
            (divergence,) = pull(jnp.ones_like(y))
        return ((y + divergence @ w) @ w).sum()

    w, x = jnp.ones((4, 4)), jnp.ones((2, 4))
    with pytest.raises(ConfigError, match=r"rules=\['flow=fp32', "):
        mpjax.autocast(flow, "fp32", rules=["**=r=fp8"])(w, x)
    left_out = mpjax.autocast(flow, "fp32", rules=["flow=fp32", "**=r=fp8"])
    gradient, right = jax.grad(left_out)(w, x), jax.grad(flow)(w, x)
    off = float(jnp.linalg.norm(gradient - right) / jnp.linalg.norm(right))
    assert 0 < off < 0.07, off
