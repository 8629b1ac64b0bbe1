"""Replicas that train apart: against a plain loop, in low precision, resumed, and refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.models import decoder
from mpjax.optim import Exchange
from mpjax.optim.annealing.annealing import annealed
from mpjax.optim.annealing.cooling import affine
from mpjax.optim.annealing.proposals import gaussian
from mpjax.precision import get_precision
from mpjax.train import Checkpointer, DiLoCo, build
from tests.train.meshes import batch, compiled, host, relative, small

pytestmark = pytest.mark.usefixtures("fast_compile")

CUBE = "data=2,fsdp=2,tensor=2"


def start(
    diloco: Any, mesh: Any = CUBE, precision: str = "fp32", compression: str = "none",
    optimizer: Any = None, scale: Any = None, **options: Any,
) -> tuple[Any, Any]:  # fmt: skip
    found = get_precision(precision, compression=compression, loss_scale=scale)
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    return build(small(found), optimizer, mesh, diloco=diloco, **options)


def run(state: Any, step: Any, steps: int, first: int = 0) -> tuple[Any, list[Any]]:
    once = compiled(state, step)
    found = []
    for i in range(first, first + steps):
        state, metrics = once(state, batch(i))
        found.append(metrics)
    return state, found


def by_hand(steps: int, every: int, lr: float, momentum: float) -> tuple[Any, list[float]]:
    """Two models on halves of each batch, and their outer steps in NumPy."""
    states, step = [], None
    for _ in range(2):
        state, step = build(small("fp32"), optax.sgd(0.1))
        states.append(state)
    assert step is not None
    once = compiled(states[0], step, jax.tree.map(lambda x: x[:4], batch()))
    common = host(states[0].params)
    velocity = jax.tree.map(np.zeros_like, common)
    losses = []
    for i in range(steps):
        whole, both = batch(i), []
        for r in range(2):
            half = jax.tree.map(lambda x, r=r: x[4 * r : 4 * r + 4], whole)
            states[r], metrics = once(states[r], half)
            both.append(float(metrics["loss"]))
        losses.append(float(np.mean(both)))
        if (i + 1) % every == 0:
            each = [host(state.params) for state in states]
            delta = jax.tree.map(lambda w, a, b: ((w - a) + (w - b)) / 2, common, *each)
            velocity = jax.tree.map(lambda m, d: momentum * m + d, velocity, delta)
            common = jax.tree.map(
                lambda w, d, m: w - lr * (d + momentum * m), common, delta, velocity
            )
            states = [s._replace(params=jax.tree.map(jnp.asarray, common)) for s in states]
    return common, losses


def test_it_is_the_loop_that_one_would_write() -> None:
    want, losses = by_hand(5, 2, 0.7, 0.9)
    state, metrics = run(*start("every=2,lr=0.7,momentum=0.9"), 5)
    assert [float(m["loss"]) for m in metrics] == pytest.approx(losses, rel=1e-5)
    assert relative(host(state.params), want) < 1e-5
    (table,) = [x for x in jax.tree.leaves(state.local.params) if x.shape[1:] == (64, 32)][:1]
    assert float(jnp.abs(table[0] - table[1]).max()) > 0  # after step 5 they have gone apart again
    other, _ = run(*start("every=2,lr=0.7,momentum=0.5"), 5)
    assert relative(host(other.params), want) > 1e-4


def same_in_all(state: Any) -> bool:
    leaves = jax.tree.leaves(state.local.params)
    return all(bool((x == x[:1]).all()) for x in leaves)


CASES = [
    ("fp16", "int4@128,min=100", CUBE, "dynamic:init=1024"),
    ("O2", "sign@64,min=100", "data=8", "dynamic:init=1024"),
    ("pure-bf16-sr", "int8@64,min=100", "data=4,fsdp=2", None),
    ("fp8-delayed", "none", CUBE, None),
]


@pytest.mark.parametrize(("precision", "compression", "mesh", "scale"), CASES)
def test_it_trains_in_low_precision_and_replicas_meet(
    precision: str, compression: str, mesh: str, scale: Any
) -> None:
    adam = optax.adamw(1e-2)
    state, step = start("every=3,momentum=0", mesh, precision, compression, adam, scale)
    once = compiled(state, step)
    losses = []
    for i in range(6):
        state, metrics = once(state, batch())
        losses.append(float(metrics["loss"]))
        assert same_in_all(state) is (i % 3 == 2)
    assert losses[-1] < losses[0] - 0.05
    if compression != "none":
        assert max(float(jnp.abs(x).max()) for x in state.exchange.residual.values()) > 0


def test_a_replica_that_is_not_finite_skips_alone() -> None:
    state, step = start("every=4", CUBE, "fp16", "int8@64,min=100", scale="dynamic:init=1024")
    once = compiled(state, step)
    before = host(state)
    broken = batch() | {"weights": jnp.ones((8, 8)).at[0, 0].set(jnp.inf)}
    once = compiled(state, step, broken)
    state, metrics = once(state, broken)
    assert int(metrics["skipped"]) == 1
    assert state.local.opt_state.loss_scale.value.tolist() == [512.0, 1024.0]
    moved = jax.tree.map(lambda a, b: (a != b).reshape(2, -1).any(1), host(state.local.params),
                         before.local.params)  # fmt: skip
    assert not any(x[0] for x in jax.tree.leaves(moved))
    assert all(x[1] for x in jax.tree.leaves(moved))
    for part in ("params", "exchange"):  # no outer step was due
        jax.tree.map(
            np.testing.assert_array_equal, getattr(host(state), part), getattr(before, part)
        )


def test_inner_steps_send_the_loss_and_no_gradient() -> None:
    state, step = start("every=3", "data=8", compression="int4@128,min=100")
    text = step.compiled.lower(state, step.place(batch())).as_text()
    inside, outside = text.partition("stablehlo.case")[2], text.partition("stablehlo.case")[0]
    assert "all_to_all" in inside and "all_to_all" not in outside
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    exact = Exchange("bf16,min=10000000", "data", 8).sent_bytes(params)
    assert Exchange("int4@128", "data", 8).sent_bytes(params) <= 0.14 * exact


def test_a_run_goes_on_between_outer_steps_and_on_another_mesh(tmp_path: Any) -> None:
    text, adam = "every=3", optax.adamw(1e-2)
    options = dict(compression="int8@64,min=100", optimizer=adam)
    state, step = start(text, CUBE, **options)
    state, _ = run(state, step, 2)
    held = host(state.local.params)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, {})
        whole, _ = run(state, step, 2, first=2)
        fresh, again = start(text, CUBE, **options, seed=1)
        state, _, _ = checkpointer.restore(fresh)
        resumed, _ = run(state, again, 2, first=2)
        jax.tree.map(np.testing.assert_array_equal, host(resumed), host(whole))
        fresh, wide = start(text, "data=4,fsdp=2", **options, seed=1)
        moved, _, _ = checkpointer.restore(fresh)
    for new, old in zip(jax.tree.leaves(moved.local.params), jax.tree.leaves(held), strict=True):
        np.testing.assert_allclose(np.asarray(new)[3], old.mean(0), rtol=1e-5, atol=1e-7)
    moved, metrics = run(moved, wide, 2, first=2)
    assert np.isfinite(float(metrics[-1]["loss"])) and same_in_all(moved) is False


WRONG: list[tuple[Any, dict[str, Any], str]] = [
    ("every=0", {}, "every=0 is no number of steps"),
    ("every=x", {}, "every='x' in 'every=x' is no number"),
    ("often", {}, "bad field 'often'"),
    ("every=2,every=3", {}, "bad field 'every=3'"),
    ("lr=0", {}, "lr=0.0 is no number above 0"),
    ("momentum=1", {}, "momentum=1.0 is not in 0 .. 1"),
    (3, {}, "3 is no text"),
    ("every=2", {"mesh": None}, "train apart, and it has 1"),
    ("every=2", {"mesh": "fsdp=8"}, "train apart, and it has 1"),
    ("every=2", {"schedule": "fixed:fp32"}, "keep one precision"),
    (
        "every=2",
        {"optimizer": annealed(gaussian(0.1), affine(1.0, 0.9))},
        "annealing has one state",
    ),
]


@pytest.mark.parametrize(("text", "options", "said"), WRONG)
def test_what_it_cannot_do_is_one_line(text: Any, options: dict[str, Any], said: str) -> None:
    options = {"mesh": "data=8", "optimizer": optax.sgd(0.1)} | options
    with pytest.raises(ConfigError) as error:
        build(decoder("tiny", layers=1, width=16, heads=2), diloco=text, **options)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert str(DiLoCo.parse(str(DiLoCo(7, 0.5, 0.0)))) == "every=7,lr=0.5,momentum=0"
