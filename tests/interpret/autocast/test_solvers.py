"""Solvers of diffrax and optimistix: the products of the function that they solve for are low."""

from __future__ import annotations

import logging
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest

import mpjax

pytestmark = pytest.mark.usefixtures("fast_compile")

BF16 = 2.0**-8
MODEL = eqx.nn.MLP(3, 3, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
START = jnp.array([0.3, -0.2, 0.5])


def _heun(model: Any, start: Any) -> Any:
    """diffrax's default adjoint, which is a `filter_custom_vjp` with symbolic zeros."""
    term = diffrax.ODETerm(lambda t, y, _: model(y))
    return diffrax.diffeqsolve(term, diffrax.Heun(), 0.0, 1.0, 0.25, start, max_steps=4).ys[0]


def _heun_by_hand(model: Any, start: Any) -> Any:
    y = start
    for _ in range(4):
        k = model(y)
        y = y + 0.125 * (k + model(y + 0.25 * k))
    return y


def _root(model: Any, start: Any) -> Any:
    solver = optimistix.Newton(rtol=1e-3, atol=1e-3)

    def residual(z: Any, x: Any) -> Any:
        return z - jnp.tanh(0.5 * model(z) + x)

    return optimistix.root_find(residual, solver, start, args=start, throw=False).value


def _root_by_hand(model: Any, start: Any) -> Any:
    z = start
    for _ in range(40):  # a contraction
        z = jnp.tanh(0.5 * model(z) + start)
    return z


@pytest.mark.parametrize("solve, by_hand", [(_heun, _heun_by_hand), (_root, _root_by_hand)])
def test_products_of_a_solver_are_low(
    solve: Any, by_hand: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def loss(model: Any, start: Any, solve: Any) -> Any:
        return jnp.sum(jnp.square(solve(model, start)))

    def low(model: Any, start: Any) -> Any:
        return mpjax.autocast(lambda m, x: loss(m, x, solve), "bf16")(model, start)

    both = eqx.filter_value_and_grad(low)
    with caplog.at_level(logging.WARNING, "mpjax.interpret"):
        found = eqx.filter_jit(both)(MODEL, START)
    right = eqx.filter_jit(eqx.filter_value_and_grad(lambda m, x: loss(m, x, by_hand)))
    a, b = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(eqx.filter(t, eqx.is_array))])
        for t in (found, right(MODEL, START))
    )
    assert BF16 / 32 < np.linalg.norm(a - b) / np.linalg.norm(b) < 8 * BF16
    report = mpjax.audit(both, MODEL, START)
    assert report.share("bfloat16") > 0.5
    # The solve of a linear system stays in float32, which is said and listed.
    wide = report.share("float32")
    named = sum(leak.share for leak in (*report.leaks, *report.minor))
    assert wide <= named + 1e-9
    assert all("linear_solve" in line for line in caplog.messages)
    assert solve is not _heun or (wide == 0.0 and caplog.messages == [])
