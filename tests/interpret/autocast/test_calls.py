"""What a jaxpr holds beside arrays and plain operations: literals, rules, calls.

Right values come from NumPy in float64; the rules have a factor that no derivative has, so that a
rule that is not used is seen.
"""

from __future__ import annotations

import logging
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero, linear_call

import mpjax
from mpjax.errors import ConfigError

pytestmark = pytest.mark.usefixtures("fast_compile")

BF16 = 2.0**-8
HALF = jnp.eye(4) * 0.5  # all of it, and what is made of it here, is exact in bfloat16
ONES = jnp.ones(4)
W = jax.random.normal(jax.random.key(0), (8, 8))
X = jax.random.normal(jax.random.key(1), (4, 8))


def _off(found: Any, exact: Any) -> float:
    a, b = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _closed_over(w: Any) -> Any:
    """Rules that close over constants of the function around them."""
    yes, two = jnp.asarray(True), jnp.asarray(2.0)

    @jax.custom_jvp
    def f(w: Any) -> Any:
        return jnp.where(yes, w @ ONES * two, ONES)

    f.defjvp(lambda p, t: (f(*p), jnp.where(yes, t[0] @ ONES * two, ONES)))

    @jax.custom_vjp
    def g(w: Any) -> Any:
        return jnp.where(yes, w @ ONES * two, ONES)

    g.defvjp(
        lambda w: (g(w), None),
        lambda _, ct: (jnp.where(yes, jnp.outer(ct, ONES) * two, jnp.zeros((4, 4))),),
    )
    return f(w) + g(w)


# Loops, branches and calls that start with, take or return Python numbers -> what is right
PLACES: dict[str, tuple[Any, Any]] = {
    "while": (
        lambda w: lax.while_loop(
            lambda c: c[0], lambda c: (c[1].sum() > 1.5, c[1] @ w), (True, ONES)
        ),
        (False, ONES / 8),
    ),
    "while with a constant test": (
        lambda w: lax.while_loop(lambda c: False, lambda c: (c[0] @ w, True), (ONES, False)),
        (ONES, False),
    ),
    "while of numbers": (
        lambda w: lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + 1.0, c[2] @ w), (0, 0.0, ONES)
        ),
        (3, 3.0, ONES / 8),
    ),
    "fori_loop": (
        lambda w: lax.fori_loop(0, 3, lambda i, c: (c[0] @ w, c[1] | (i > 1)), (ONES, False)),
        (ONES / 8, True),
    ),
    "scan": (
        lambda w: lax.scan(
            lambda c, _: ((c[0] | (c[1].sum() < 1), c[1] @ w), (True, 2.0, 1)),
            (False, ONES), None, length=3,
        ),
        ((False, ONES / 8), (np.full(3, True), np.full(3, 2.0), np.full(3, 1))),
    ),
    "cond": (
        lambda w: lax.cond(
            w.sum() > 0, lambda b: (w @ ONES, b, 2.0), lambda b: (ONES, b, 1.0), True
        ),
        (ONES / 2, True, 2.0),
    ),
    "jit": (
        lambda w: jax.jit(lambda w, b: (jnp.where(b, w @ ONES, ONES), b, True))(w, True),
        (ONES / 2, True, True),
    ),
    "checkpoint": (
        lambda w: jax.checkpoint(lambda w, b: (jnp.where(b, w @ ONES, ONES), True))(w, True),
        (ONES / 2, True),
    ),
    "vmap of a loop": (
        lambda w: jax.vmap(
            lambda r: lax.while_loop(
                lambda c: c[0], lambda c: (c[1].sum() > 0.2, c[1] / 2), (True, r)
            )
        )(w @ w),
        (np.full(4, False), np.eye(4) / 16),
    ),
    "complex": (
        lambda w: lax.scan(lambda c, _: (c * 1j, None), 1j, None, length=3)[0].real * (ONES @ w),
        ONES / 2,
    ),
    "outputs": (lambda w: (w @ ONES, jnp.asarray(True), jnp.asarray(3)), (ONES / 2, True, 3)),
    "rules that close over constants": (_closed_over, ONES * 2),
}  # fmt: skip


def _everywhere(w: Any) -> dict[str, Any]:
    return {name: fn(w) for name, (fn, _) in PLACES.items()}


RIGHT = {name: right for name, (_, right) in PLACES.items()}


@pytest.mark.parametrize("tool", ["autocast", "float16", "monitor"])
def test_literals_anywhere_in_a_jaxpr(tool: str) -> None:
    transformed = {
        "autocast": lambda w: mpjax.autocast(_everywhere, "bf16")(w),
        "float16": lambda w: mpjax.autocast(_everywhere, "fp16")(w),
        "monitor": lambda w: mpjax.monitor(_everywhere, formats=("e4m3",))(w)[0],
    }[tool]
    jax.tree.map(np.testing.assert_array_equal, jax.jit(transformed)(HALF), RIGHT)


def test_literals_in_audit_and_trace_nonfinite() -> None:
    assert mpjax.audit(mpjax.autocast(_everywhere, "bf16"), HALF).share("bfloat16") == 1.0
    assert mpjax.trace_nonfinite(_everywhere, HALF) is None


def test_gradient_of_a_rule_that_closes_over_a_constant() -> None:
    gradient = jax.grad(mpjax.autocast(lambda w: _closed_over(w).sum(), "bf16"))(HALF)
    np.testing.assert_array_equal(gradient, np.full((4, 4), 4.0))


# ---- rules with symbolic zeros

seen: list[tuple[Any, ...]] = []


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


@jax.custom_vjp
def _layer(w: Any, x: Any, n: int) -> Any:
    return jnp.tanh(x @ w) * n, w * 2


def _layer_fwd(w: Any, x: Any, n: Any) -> Any:
    seen.append((w.perturbed, x.perturbed, n.perturbed))
    return _layer(w.value, x.value, n.value), (w.value, x.value, n.value)


def _layer_bwd(saved: Any, cotangents: Any) -> Any:
    w, x, n = saved
    y, doubled = cotangents
    seen.append((_is_zero(y), _is_zero(doubled)))
    d = None if _is_zero(y) else y * (1 - jnp.tanh(x @ w) ** 2) * n
    dw = jnp.zeros_like(w) if d is None else x.T @ d * 3  # 3: the rule's own
    return dw if _is_zero(doubled) else dw + 2 * doubled, None if d is None else d @ w.T, None


_layer.defvjp(_layer_fwd, _layer_bwd, symbolic_zeros=True)


def _layer_gradients(first: float, second: float) -> tuple[np.ndarray, np.ndarray]:
    """By hand, of first * sum(tanh(x w)) * 2 + second * sum(2 w), with the rule's 3."""
    w, x = np.asarray(W, np.float64), np.asarray(X, np.float64)
    d = first * 2 * (1 - np.tanh(x @ w) ** 2)
    return 3 * x.T @ d + second * 2 * np.ones_like(w), d @ w.T


@pytest.mark.parametrize("argnums", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("first, second", [(1.0, 0.0), (1.0, 1.0), (0.0, 1.0)])
def test_symbolic_zeros_of_a_custom_vjp(argnums: Any, first: float, second: float) -> None:
    def loss(w: Any, x: Any) -> Any:
        y, doubled = _layer(w, x, 2)
        return (first and first * y.sum()) + (second and second * doubled.sum())

    exact = [_layer_gradients(first, second)[i] for i in argnums]
    for outside in (True, False):
        seen.clear()
        gradient = jax.grad(mpjax.autocast(loss, "bf16"), argnums)
        inside = mpjax.autocast(jax.grad(loss, argnums), "bf16")
        found = (gradient if outside else inside)(W, X)
        for got, right in zip(found, exact, strict=True):
            assert got.dtype == jnp.float32
            assert np.allclose(right, 0) and not np.any(got) or _off(got, right) < 4 * BF16
        assert seen[0] == (0 in argnums, 1 in argnums, False)
        if first and outside:  # else nothing differs
            assert _off(found[0], exact[0]) > BF16 / 8
        assert (first == 0.0, second == 0.0) in seen


def _loss(w: Any, x: Any) -> Any:
    return _layer(w, x, 2)[0].sum()


def test_products_of_a_rule_with_symbolic_zeros_are_low() -> None:
    report = mpjax.audit(jax.grad(mpjax.autocast(_loss, "bf16"), (0, 1)), W, X)
    assert report.share("bfloat16") == 1.0 and report.leaks == ()


def test_symbolic_zeros_under_transforms() -> None:
    low = mpjax.autocast(_loss, "bf16")
    rows = X[:, None]
    of_rows = jax.jit(jax.vmap(jax.grad(low), (None, 0)))(W, rows)
    assert of_rows.shape == (4, 8, 8)
    exact = _layer_gradients(1.0, 0.0)[0]
    assert _off(of_rows.sum(0), exact) < 4 * BF16
    scanned = jax.grad(lambda w: lax.scan(lambda c, x: (c + low(w, x), None), 0.0, rows)[0])
    assert _off(jax.jit(jax.checkpoint(scanned))(W), exact) < 4 * BF16


def test_symbolic_zeros_of_a_custom_jvp() -> None:
    @jax.custom_jvp
    def product(w: Any, x: Any) -> Any:
        return x @ w

    def rule(primals: Any, tangents: Any) -> Any:
        (w, x), (dw, dx) = primals, tangents
        parts = [] if _is_zero(dw) else [3 * (x @ dw)]
        parts += [] if _is_zero(dx) else [dx @ w]
        y = product(w, x)
        return y, sum(parts[1:], parts[0]) if parts else SymbolicZero(jax.typeof(y))

    product.defjvp(rule, symbolic_zeros=True)

    def loss(w: Any, x: Any) -> Any:
        return product(w, x).sum()

    w, x = np.asarray(W, np.float64), np.asarray(X, np.float64)
    exact = 3 * x.T @ np.ones((4, 8)), np.ones((4, 8)) @ w.T
    for argnums in ((0,), (1,), (0, 1)):
        low = jax.grad(mpjax.autocast(loss, "bf16"), argnums)
        for got, number in zip(low(W, X), argnums, strict=True):
            assert BF16 / 8 < _off(got, exact[number]) < 2 * BF16
        assert mpjax.audit(low, W, X).share("bfloat16") == 1.0


def test_equinox_filter_custom_vjp() -> None:
    @eqx.filter_custom_vjp
    def layers(model: Any, x: Any, how: str) -> Any:
        return jax.vmap(model)(x)

    @layers.def_fwd
    def _(perturbed: Any, model: Any, x: Any, how: str) -> Any:
        return jax.vmap(model)(x), None

    @layers.def_bwd
    def _(saved: Any, g: Any, perturbed: Any, model: Any, x: Any, how: str) -> Any:
        return eqx.filter_vjp(lambda m: jax.vmap(m)(x), model)[1](g * 3)[0]

    model = eqx.nn.MLP(8, 3, 16, 1, key=jax.random.key(0))

    def loss(model: Any, x: Any, times: Any) -> Any:
        return jnp.sum(times * jnp.square(layers(model, x, "some")))

    def plain(model: Any, x: Any) -> Any:
        return 3 * jnp.sum(jnp.square(jax.vmap(model)(x)))

    low = eqx.filter_grad(mpjax.autocast(loss, "bf16"))
    found, exact = (
        eqx.filter(t, eqx.is_array) for t in (low(model, X, 1.0), eqx.filter_grad(plain)(model, X))
    )
    for got, right in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        assert BF16 / 16 < _off(got, right) < 8 * BF16
    report = mpjax.audit(low, model, X, 1.0)
    assert report.share("bfloat16") == 1.0 and report.leaks == ()


def test_what_a_custom_vjp_closes_over_has_no_gradient() -> None:
    def loss(w: Any, x: Any) -> Any:
        @jax.custom_vjp
        def product(x: Any) -> Any:
            return x @ w

        product.defvjp(lambda x: (product(x), None), lambda _, g: (g @ w.T,))
        return product(x).sum()

    low = mpjax.autocast(loss, "bf16")
    assert _off(jax.grad(low, 1)(W, X), np.ones((4, 8)) @ np.asarray(W).T) < 2 * BF16
    with pytest.raises(
        ConfigError, match="custom_vjp function product .* pass the array as an arg"
    ):
        jax.grad(low)(W, X)


# ---- other calls that hold jaxprs


@jax.custom_batching.custom_vmap
def _batched(w: Any, x: Any) -> Any:
    return x @ w


@_batched.def_vmap
def _(size: int, batched: Any, w: Any, x: Any) -> Any:
    return 2 * (x.reshape(-1, 8) @ w).reshape(*x.shape[:-1], 8), True  # 2: the rule's own


def test_custom_vmap_is_low_with_its_rule() -> None:
    exact = np.asarray(X, np.float64) @ np.asarray(W, np.float64)
    low, mapped = mpjax.autocast(_batched, "bf16"), jax.vmap(_batched, (None, 0))
    for found, right in (
        (low(W, X), exact),
        (jax.vmap(low, (None, 0))(W, X[:, None])[:, 0], 2 * exact),
        (mpjax.autocast(mapped, "bf16")(W, X[:, None])[:, 0], 2 * exact),
    ):
        assert BF16 / 8 < _off(found, right) < 2 * BF16
    assert mpjax.audit(jax.vmap(low, (None, 0)), W, X[:, None]).share("bfloat16") == 1.0


def test_composite_is_low_under_its_name() -> None:
    low = mpjax.autocast(lax.composite(lambda x, w: x @ w, "my.product"), "bf16")
    assert BF16 / 8 < _off(low(X, W), np.asarray(X, np.float64) @ np.asarray(W)) < 2 * BF16
    assert "my.product" in jax.jit(low).lower(X, W).as_text()
    assert mpjax.audit(low, X, W).share("bfloat16") == 1.0


def _with_solve(a: Any, b: Any) -> Any:
    return jax.scipy.sparse.linalg.cg(lambda v: a @ v, b, maxiter=20)[0]


def test_what_cannot_be_cast_is_said_once_and_listed(caplog: pytest.LogCaptureFixture) -> None:
    a = W @ W.T + 8 * jnp.eye(8)
    low = mpjax.autocast(_with_solve, "bf16")
    with caplog.at_level(logging.WARNING, "mpjax.interpret"):
        found = low(a, X[0])
        low(a, X[0])
    (line,) = caplog.messages
    assert "test_calls.py" in line and "custom_linear_solve stays as it was traced" in line
    exact = np.linalg.solve(np.asarray(a, np.float64), np.asarray(X[0], np.float64))
    assert _off(found, exact) < 1e-5  # not low: 8 bits would not reach its tolerance

    report = mpjax.audit(low, a, X[0])
    assert {leak.mechanism for leak in report.leaks} == {"opaque"} and report.share("float32") == 1
    assert all("custom_linear_solve" in leak.origin for leak in report.leaks)
    with pytest.raises(AssertionError, match="opaque"):
        mpjax.assert_low_precision(low, a, X[0])
    kept = mpjax.autocast(mpjax.no_autocast(_with_solve), "bf16")
    assert mpjax.audit(kept, a, X[0]).leaks == ()  # asked for


def test_a_call_that_is_not_looked_into_is_a_leak_too(caplog: pytest.LogCaptureFixture) -> None:
    low = mpjax.autocast(
        lambda w, x: linear_call(lambda w, x: x @ w, lambda w, g: g @ w.T, w, x) @ w, "bf16"
    )
    with caplog.at_level(logging.WARNING, "mpjax.interpret"):
        report = mpjax.audit(low, W, X)
    assert "linear_call stays as it was traced, with 1 product in float32" in caplog.text
    assert [leak.mechanism for leak in report.leaks] == ["opaque"]


def test_a_solve_without_products_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    low = mpjax.autocast(lambda a, b: jnp.linalg.solve(a, b) @ a, "bf16")
    with caplog.at_level(logging.WARNING, "mpjax.interpret"):
        report = mpjax.audit(low, W, X[0])
    assert caplog.messages == [] and report.leaks == ()
