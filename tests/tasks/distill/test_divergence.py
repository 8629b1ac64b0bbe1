"""The divergences and their gradients against float64, with mutants."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from mpjax.errors import ConfigError
from mpjax.tasks import divergence

KINDS = ("forward", "reverse", "jensen-shannon")


def exact(s: np.ndarray, t: np.ndarray, temperature: float, kind: str, mix: float) -> np.ndarray:
    q, p = log_softmax(s / temperature, -1), log_softmax(t / temperature, -1)
    kl = lambda a, b: np.sum(np.exp(a) * (a - b), -1)  # noqa: E731
    m = np.log(mix * np.exp(p) + (1 - mix) * np.exp(q))
    found = {
        "forward": kl(p, q), "reverse": kl(q, p), "jensen-shannon": mix * kl(p, m)
        + (1 - mix) * kl(q, m),
    }[kind]  # fmt: skip
    return temperature**2 * found


def slope(s: np.ndarray, *rest: Any) -> np.ndarray:
    """The gradient of the sum with respect to the student, by central differences in float64."""
    out, h = np.zeros_like(s), 1e-5
    for i in np.ndindex(s.shape):
        d = np.zeros_like(s)
        d[i] = h
        out[i] = (exact(s + d, *rest).sum() - exact(s - d, *rest).sum()) / (2 * h)
    return out


def logits(dtype: Any) -> tuple[Any, Any, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    s, t = (jnp.asarray(3 * rng.normal(size=(5, 7)), jnp.float32).astype(dtype) for _ in "st")
    return s, t, np.asarray(s, np.float64), np.asarray(t, np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 16.0])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_float64s(kind: str, temperature: float, dtype: Any) -> None:
    s, t, s64, t64 = logits(dtype)
    settings = dict(temperature=temperature, kind=kind, mix=0.3)
    found = divergence(s, t, **settings)  # type: ignore[arg-type]
    right = exact(s64, t64, temperature, kind, 0.3)
    np.testing.assert_allclose(found, right, rtol=3e-5, atol=1e-5)
    grad = jax.grad(lambda s: divergence(s, t, **settings).sum())(s)  # type: ignore[arg-type]
    assert grad.dtype == dtype
    wanted = slope(s64, t64, temperature, kind, 0.3)
    # one rounding of the dtype, and the differences' own error
    one = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.asarray(grad, np.float64), wanted, rtol=1.01 * one, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_mutants_are_told_apart(kind: str) -> None:
    s, t, s64, t64 = logits(jnp.float32)
    right = exact(s64, t64, 4.0, kind, 0.3)
    found = {
        "no square of the temperature": divergence(s, t, temperature=4.0, kind=kind, mix=0.3) / 16,
        "temperature 1": divergence(s, t, kind=kind, mix=0.3),
        "swapped": divergence(t, s, temperature=4.0, kind=kind, mix=0.3),
    }
    for name, wrong in found.items():
        assert np.max(np.abs(wrong / right - 1)) > 0.01, name


def test_no_gradient_goes_to_the_teacher() -> None:
    s, t, *_ = logits(jnp.float32)
    for kind in KINDS:
        grad = jax.grad(lambda t, kind=kind: divergence(s, t, kind=kind).sum())(t)
        assert not np.any(grad)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_are_left_out_cost_nothing(kind: str) -> None:
    s, t, *_ = logits(jnp.float32)
    masked = [x.at[:, 2].set(-jnp.inf) for x in (s, t)]
    some = [jnp.delete(x, 2, axis=1) for x in (s, t)]
    np.testing.assert_allclose(divergence(*masked, kind=kind), divergence(*some, kind=kind), 1e-5)
    grad = jax.grad(lambda s: divergence(s, masked[1], kind=kind).sum())(masked[0])
    assert np.isfinite(grad).all() and not np.any(grad[:, 2])


def test_mistakes_are_one_line() -> None:
    s, t, *_ = logits(jnp.float32)
    for call, message in (
        (lambda: divergence(s, t, temperature=0.0), "temperature=0.0 is not a positive number"),
        (lambda: divergence(s, t, kind="js"), "unknown kind 'js'; known: forward reverse"),
        (lambda: divergence(s, t, mix=1.0), "mix=1.0 is not between 0 and 1"),
        (lambda: divergence(s, t[:, 1:]), "both need one vocabulary and one batch"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
