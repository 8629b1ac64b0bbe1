"""Compressed gradients in the train step: shares, skips, meshes, resume, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.ops import Objective
from mpjax.optim import ScaledGradients, wrap
from mpjax.optim.annealing.annealing import annealed
from mpjax.optim.annealing.cooling import affine
from mpjax.optim.annealing.proposals import gaussian
from mpjax.precision import get_precision
from mpjax.train import Checkpointer, build, init_state, make_train_step, restore_into
from tests.train.meshes import batch, compiled, host, relative, small

pytestmark = pytest.mark.usefixtures("fast_compile")

CUBE = "data=2,fsdp=2,tensor=2"


def uneven(seed: int = 0) -> dict[str, Any]:
    """A batch whose replicas have different numbers of targets."""
    weights = np.ones((8, 8), np.float32)
    weights[0, 1:] = weights[5, 3:] = 0
    weights[6] = 0.25
    return batch(seed) | {"weights": jnp.asarray(weights)}


def start(
    text: str, mesh: str = "data=8", precision: str = "fp32", optimizer: Any = None, **options: Any
) -> tuple[Any, Any]:
    precision = get_precision(precision, compression=text, loss_scale=options.pop("scale", None))
    optimizer = optax.sgd(0.5, momentum=0.9) if optimizer is None else optimizer
    return build(small(precision), optimizer, mesh, **options)


def run(state: Any, step: Any, steps: int, first: int = 0) -> tuple[Any, list[float]]:
    once = compiled(state, step, uneven())
    losses = []
    for i in range(first, first + steps):
        state, metrics = once(state, uneven(i))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize(
    ("mesh", "accumulate"), [("data=8", 1), ("data=2,fsdp=2,tensor=2", 2), ("data=4,tensor=2", 2)]
)
def test_replicas_apart_take_the_gradient_of_the_batch(mesh: str, accumulate: int) -> None:
    whole, losses = run(*start("none", mesh, accumulate=accumulate, clip=1.0), 3)
    # Nothing is large enough to be compressed: all means are float32.
    apart, same = run(*start("int8,min=1000000", mesh, accumulate=accumulate, clip=1.0), 3)
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    assert relative(host(apart.params), host(whole.params)) < 2e-5
    free, _ = run(*start("none", mesh, accumulate=accumulate), 3)
    assert relative(host(free.params), host(whole.params)) > 1e-3  # gradients were clipped
    coded, other = run(*start("int8,min=100", mesh, accumulate=accumulate, clip=1.0), 3)
    assert relative(host(coded.params), host(whole.params)) > 1e-4  # it would show
    assert abs(other[-1] - losses[-1]) < 0.01


CASES = [
    ("int8@64", CUBE, "fp16"), ("powersgd:2", CUBE, "fp8-delayed"), ("sign@64", "data=8", "O2"),
    ("topk:0.05,momentum=0.9", "data=4,tensor=2", "bf16"), ("e4m3@64", CUBE, "pure-bf16-sr"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "mesh", "precision"), CASES)
def test_it_trains_and_a_skipped_step_leaves_every_bit(
    text: str, mesh: str, precision: str
) -> None:
    scale = None if precision == "pure-bf16-sr" else "dynamic:init=1024"
    state, step = start(f"{text},min=100", mesh, precision, optax.adamw(1e-2), scale=scale)
    once = compiled(state, step, uneven())
    losses = []
    for _ in range(4):
        state, metrics = once(state, uneven())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1 and int(metrics["skipped"]) == 0
    residual = sum(float(jnp.abs(x).max()) for x in state.exchange.residual.values())
    assert residual > 0
    before = host(state)
    broken = uneven()
    broken["weights"] = broken["weights"].at[0, 0].set(jnp.inf)  # of the first replica alone
    state, metrics = once(state, broken)
    assert int(metrics["skipped"]) == 1
    after = host(state)
    for part in ("params", "exchange", "model_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    jax.tree.map(np.testing.assert_array_equal, after.opt_state.inner, before.opt_state.inner)
    state, metrics = once(state, uneven())
    assert np.isfinite(float(metrics["loss"])) and int(metrics["skipped"]) == 1


@pytest.mark.parametrize("text", ["int8@64", "powersgd:2", "topk:0.05,momentum=0.9"])
def test_a_run_goes_on_with_the_same_bits(text: str, tmp_path: Any) -> None:
    state, step = start(f"{text},min=100", CUBE)
    state, _ = run(state, step, 2)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, {})
        whole, _ = run(state, step, 2, first=2)
        fresh, step = start(f"{text},min=100", CUBE, seed=1)
        state, _, _ = checkpointer.restore(fresh)
    again, _ = run(state, step, 2, first=2)
    jax.tree.map(np.testing.assert_array_equal, host(again), host(whole))


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=4", "data=4,fsdp=2"])
@pytest.mark.parametrize("text", ["int8@64", "powersgd:2"])
def test_what_was_not_sent_survives_another_mesh(text: str, mesh: str, tmp_path: Any) -> None:
    state, step = start(f"{text},min=100", CUBE)
    state, _ = run(state, step, 3)
    fresh, step = start(f"{text},min=100", mesh, seed=1)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, {})
        moved, _, _ = checkpointer.restore(fresh)
        recast, lines = restore_into(fresh, checkpointer)
    assert lines == []
    jax.tree.map(np.testing.assert_array_equal, host(recast), host(moved))
    jax.tree.map(np.testing.assert_array_equal, host(moved.params), host(state.params))
    for name, residual in state.exchange.residual.items():
        mean = np.asarray(residual).mean(0)
        assert np.abs(mean).max() > 0
        np.testing.assert_allclose(
            np.asarray(moved.exchange.residual[name]).mean(0), mean, rtol=1e-5, atol=1e-9
        )
    _, losses = run(moved, step, 3, first=3)
    assert np.isfinite(losses).all()


def test_an_optimizer_alone_takes_exchanged_gradients_only() -> None:
    params = {"w": jnp.ones(3)}
    compressed = wrap(optax.sgd(1.0), get_precision("fp16", compression="int8"))
    state = compressed.init(params)
    grads = {"w": jnp.ones(3)}
    with pytest.raises(ConfigError, match="int8@256 is of replicas, whose gradients"):
        compressed.step(ScaledGradients(grads), state, params)
    new, _ = compressed.step(grads, state, params, exchanged=True)
    assert new["w"].tolist() == [0.0, 0.0, 0.0]  # not divided by the loss scale
    with pytest.raises(ConfigError, match="step: these are gradients of the scaled loss"):
        compressed.step(ScaledGradients(grads), state, params, exchanged=True)
    plain = wrap(optax.sgd(1.0), "fp32")
    with pytest.raises(ConfigError, match="compresses nothing; leave it out"):
        plain.step(grads, plain.init(params), params, exchanged=True)


class Both:
    """Combines the gradients of two losses."""

    names, own_scales = ("a", "b"), False

    def init(self) -> None:
        """Keeps nothing."""

    def __call__(self, grads: Any, losses: Any, key: Any, state: Any) -> Any:
        return grads[0], None, {}


def combined(model: Any) -> Objective:
    def terms(params: Any, batch: Any, **options: Any) -> Any:
        loss, state = model.loss(params, batch, **options)
        return {"a": loss, "b": loss}, state, {}

    def count(batch: Any) -> Any:
        return {"a": jnp.float32(1), "b": jnp.float32(1)}

    return Objective.of_terms(terms, count, combine=Both())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mesh": None}, "the axis 'data' has 1; give it at least 2, or set compression=none"),
        ({"mesh": "fsdp=8"}, "the axis 'data' has 1"),
        ({"objective": combined}, "combines the gradients of several losses"),
        ({"optimizer": annealed(gaussian(0.1), affine(1.0, 0.9))}, "annealing judges weights"),
        ({"optimizer": optax.lbfgs(0.1)}, "asks for the loss at other weights"),
    ],
)
def test_what_replicas_cannot_do_is_one_line(options: dict[str, Any], said: str) -> None:
    options = {"mesh": "data=8", "optimizer": optax.sgd(0.1)} | options
    with pytest.raises(ConfigError) as error:
        state, step = build(small(get_precision("fp32", compression="int8")), **options)
        step(state, batch())
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_state_without_what_replicas_keep_is_refused() -> None:
    state, step = start("int8,min=100")
    bare = init_state(host(state.params), step.optimizer)
    mesh, shardings = step.mesh, step.shardings
    again = make_train_step(small().loss, step.optimizer, mesh=mesh, shardings=shardings)
    with pytest.raises(ConfigError, match="take mpjax.train.build, or pass exchange="):
        jax.eval_shape(again.function, bare, batch())
