"""What JAX leaves in pieces (softmax, norms, losses): as good as float32, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.interpret.autocast import evaluate
from mpjax.interpret.autocast.autocast import autocast

pytestmark = pytest.mark.usefixtures("fast_compile")

ROWS, WIDTH = 4, 16
ROUNDING = 2.0**-8  # of bfloat16, relative
LABELS = np.array([3, 0, 15, 7])


def _softmax(x: Any) -> Any:
    e = jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True)))
    return e / e.sum(-1, keepdims=True)


def _logsumexp(x: Any) -> Any:
    top = jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True))
    return jnp.log(jnp.sum(jnp.exp(x - top), -1)) + jnp.squeeze(top, -1)


def _layer_norm(x: Any) -> Any:
    mean = jnp.mean(x, -1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(jnp.mean((x - mean) ** 2, -1, keepdims=True) + 1e-6)


def _layer_norm_var(x: Any) -> Any:
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-6)


def _rms_norm(x: Any) -> Any:
    return x / jnp.sqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def _group_norm(x: Any) -> Any:
    return _layer_norm_var(x.reshape(ROWS, 4, WIDTH // 4)).reshape(x.shape)


def _variance(x: Any) -> Any:
    return jnp.sum((x - jnp.mean(x, -1, keepdims=True)) ** 2, -1) / (WIDTH - 1)


def _cross_entropy(x: Any) -> Any:
    log_p = x - _logsumexp(x)[:, None]
    return -jnp.take_along_axis(log_p, LABELS[:, None], -1).mean()


def _one_hot_entropy(x: Any) -> Any:
    return -(jax.nn.one_hot(LABELS, WIDTH) * jax.nn.log_softmax(x)).sum(-1).mean()


def _of_module(module: nn.Module) -> Callable[[Any], Any]:
    return lambda x: module.apply(module.init(jax.random.key(0), jnp.zeros((ROWS, WIDTH))), x)


COMPOSITES: dict[str, Callable[[Any], Any]] = {
    "softmax by hand": _softmax,
    "jax.nn.softmax": jax.nn.softmax,
    "log_softmax by hand": lambda x: x - _logsumexp(x)[:, None],
    "jax.nn.log_softmax": jax.nn.log_softmax,
    "logsumexp by hand": _logsumexp,
    "jax.nn.logsumexp": lambda x: jax.nn.logsumexp(x, axis=-1),
    "LayerNorm by hand": _layer_norm,
    "LayerNorm of jnp.var": _layer_norm_var,
    "flax LayerNorm": _of_module(nn.LayerNorm()),
    "flax LayerNorm, two passes": _of_module(nn.LayerNorm(use_fast_variance=False)),
    "jax.nn.standardize": jax.nn.standardize,
    "RMSNorm by hand": _rms_norm,
    "RMSNorm by rsqrt": lambda x: x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6),
    "flax RMSNorm": _of_module(nn.RMSNorm()),
    "GroupNorm by hand": _group_norm,
    "flax GroupNorm": _of_module(nn.GroupNorm(num_groups=4)),
    "variance by hand": _variance,
    "jnp.var": lambda x: jnp.var(x, -1),
    "jnp.std": lambda x: jnp.std(x, -1),
    "norm": lambda x: jnp.linalg.norm(x, axis=-1),
    "cross-entropy by hand": _cross_entropy,
    "cross-entropy of a one-hot": _one_hot_entropy,
    "optax cross-entropy": lambda x: optax.softmax_cross_entropy_with_integer_labels(
        x, LABELS
    ).mean(),
    "optax one-hot cross-entropy": lambda x: optax.softmax_cross_entropy(
        x, jax.nn.one_hot(LABELS, WIDTH)
    ).mean(),
    "optax sigmoid cross-entropy": lambda x: optax.sigmoid_binary_cross_entropy(
        x, jax.nn.one_hot(LABELS, WIDTH)
    ).mean(),
}
INPUTS = ("mean 100", "range 1e4", "logits")
MADE = ("product", "product, grad inside")


def _inputs() -> jax.Array:
    """Numbers that bfloat16 holds exactly, of each kind."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((ROWS, WIDTH))
    x = [100 + 4 * normal, rng.uniform(-1e4, 1e4, (ROWS, WIDTH)), 3 * normal]
    return jnp.asarray(np.stack(x), jnp.bfloat16).astype(jnp.float32)


def _weighted(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A number whose gradient weighs every output differently, beside the outputs."""

    def loss(x: Any) -> Any:
        y = fn(x)
        weights = np.random.default_rng(1).uniform(0.5, 1.5, y.shape)
        return jnp.sum(y * jnp.asarray(weights, jnp.float32)), y

    return loss


def _results(names: tuple[str, ...]) -> dict[Any, Any]:
    """Outputs and gradients of composites, plain and under autocast; one program for all."""

    def every(x: jax.Array) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        eye = jnp.eye(WIDTH)
        for name in names:
            loss = _weighted(COMPOSITES[name])
            plain = jax.grad(loss, has_aux=True)
            runs = {
                "plain": plain,
                "product": jax.grad(autocast(lambda x, f=loss: f(x @ eye), "bf16"), has_aux=True),
                "product, grad inside": autocast(lambda x, f=plain: f(x @ eye), "bf16"),
            }
            for made, run in runs.items():
                found[name, made] = jax.vmap(run)(x)
        return found

    # XLA on CPUs otherwise leaves out a cast to bfloat16 and back, and nothing could fail here
    options = {"xla_allow_excess_precision": False}
    return jax.jit(every, compiler_options=options)(_inputs())


# How many roundings a gradient may be off, where that is more than one: differentiated inside, a
# log-sigmoid is pieces of two calls, and what passes between them is rounded.
LOOSE = {("optax sigmoid cross-entropy", "product, grad inside"): 5.0}


def _close(got: Any, plain: Any, roundings: float = 1.0) -> bool:
    """Whether it is float32's result, rounded once to bfloat16 or not at all."""
    got, plain = np.asarray(got, np.float64), np.asarray(plain, np.float64)
    # float32 itself, summed in another order
    noise = 2.0**-16 * np.abs(plain).max()
    return bool(np.all(np.abs(got - plain) <= roundings * ROUNDING * np.abs(plain) + noise))


@pytest.fixture(scope="module")
def results() -> dict[Any, Any]:
    return _results(tuple(COMPOSITES))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("name", COMPOSITES)
def test_composite_is_float32s_up_to_one_rounding(results, name, made, kind):
    number = INPUTS.index(kind)
    gradient, outputs = jax.tree.map(lambda x: x[number], results[name, made])
    wanted_gradient, wanted = jax.tree.map(lambda x: x[number], results[name, "plain"])
    assert outputs.dtype == wanted.dtype == jnp.float32
    assert _close(outputs, wanted)
    assert _close(gradient, wanted_gradient, LOOSE.get((name, made), 1.0))
    assert np.abs(wanted).max() > 0


@pytest.mark.parametrize("name", COMPOSITES)
def test_composite_of_float32_stays_in_float32(name):
    fn, x = COMPOSITES[name], _inputs()[0]
    assert "bf16" not in str(
        jax.make_jaxpr(jax.grad(autocast(_weighted(fn), "bf16"), has_aux=True))(x)
    )


def test_composites_need_backward_demand(monkeypatch):
    """The same check fails where only the listed operations run in float32."""
    monkeypatch.setattr(evaluate, "float32_consumers", lambda *_: frozenset())
    names = ("jax.nn.softmax", "softmax by hand", "flax LayerNorm")
    found = _results(names)
    close = {
        (name, kind): _close(found[name, "product"][1][i], found[name, "plain"][1][i])
        for name in names
        for i, kind in enumerate(INPUTS)
    }
    assert not close["jax.nn.softmax", "logits"]
    assert not close["softmax by hand", "logits"]
    assert not close["flax LayerNorm", "mean 100"]
