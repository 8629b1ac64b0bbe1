"""Annealing in the train step: what a rejection leaves, which losses decide, hybrids, meshes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.models import decoder
from mpjax.optim import ScaledGradients, wrap
from mpjax.optim.annealing import (
    affine,
    alternate,
    anneal_then_descend,
    annealed,
    gaussian,
    langevin,
    random_rate,
)
from mpjax.train import (
    Checkpointer,
    CheckpointReader,
    build,
    init_state,
    make_train_step,
)

pytestmark = pytest.mark.usefixtures("fast_compile")

HOT, COLD = affine(1e6, 1.0), affine(1e-20, 1.0)


def loss_fn(params: Any, batch: Any, *, state: Any = None, key: Any = None, train: bool = False):
    w = params["w"].astype(jnp.float32)
    return jnp.mean(jnp.square(batch["x"] @ w - batch["y"])), state


def data(seed: int = 0) -> dict[str, Any]:
    x = jax.random.normal(jax.random.key(seed), (16, 8))
    return {"x": x, "y": x @ jnp.linspace(-1, 1, 8)}


def weights(dtype: Any = jnp.float32) -> dict[str, Any]:
    return {"w": jax.random.normal(jax.random.key(9), (8,)).astype(dtype)}


def bytes_of(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def trained(annealing: Any, precision: str = "fp32", dtype: Any = jnp.float32, steps: int = 5):
    """States and metrics of some steps, the first state included."""
    opt = wrap(annealing, precision)
    step = make_train_step(loss_fn, opt)
    state = init_state(weights(dtype), opt)
    states, metrics = [jax.device_get(state)], []
    for seed in range(steps):
        state, found = step(state, data(seed))
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    return states, metrics


LOW = {"fp32": jnp.float32, "pure-bf16-kahan": jnp.bfloat16, "pure-bf16-sr": jnp.bfloat16,
       "O2 loss_scale=static:8": jnp.float16}  # fmt: skip


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", ["gaussian", "random rate"])
def test_a_rejection_leaves_all_bits_and_an_acceptance_does_not(name: str, precision: str) -> None:
    # a thousand times its size, or a step far beyond the minimum: never better
    proposal = gaussian(1e3) if name == "gaussian" else random_rate([1e3])
    before, after = trained(annealed(proposal, COLD), precision, LOW[precision], steps=1)[0]
    assert bytes_of(after.params) == bytes_of(before.params)
    assert bytes_of(after.opt_state.update_state) == bytes_of(before.opt_state.update_state)
    assert (int(after.opt_state.inner.proposed), int(after.opt_state.inner.accepted)) == (1, 0)
    assert int(after.opt_state.gate.skipped) == 0
    mild = gaussian(0.1) if name == "gaussian" else random_rate([0.01])
    before, after = trained(annealed(mild, HOT), precision, LOW[precision], steps=1)[0]
    assert bytes_of(after.params) != bytes_of(before.params)
    assert int(after.opt_state.inner.accepted) == 1


def test_a_proposal_without_a_finite_loss_is_rejected_and_no_skip() -> None:
    def judged(loss: float) -> Any:
        opt, w = wrap(annealed(gaussian(0.1), HOT), "fp16"), jnp.ones(4)
        state = opt.init(w)
        found = opt.step(
            ScaledGradients(jnp.zeros(4)),
            state,
            w,
            value=jnp.float32(1),
            evaluate=lambda w, _: (loss, None),
        )
        return w, *found

    for loss in (np.nan, np.inf):
        old, new, state = judged(jnp.float32(loss))
        assert bytes_of(new) == bytes_of(old)
        assert (int(state.inner.proposed), int(state.inner.accepted)) == (1, 0)
        assert int(state.gate.skipped) == 0
    old, new, state = judged(jnp.float32(0.5))
    assert bytes_of(new) != bytes_of(old) and int(state.inner.accepted) == 1


def test_a_skipped_step_leaves_the_state_of_annealing_too() -> None:
    opt, w = wrap(annealed(langevin(0.1), HOT), "fp32"), jnp.ones(4)
    state = opt.init(w)
    g = jnp.array([1.0, jnp.nan, 0.0, 0.0])
    new, after = opt.step(
        g, state, w, value=jnp.float32(1), evaluate=lambda w, _: (jnp.float32(0), g)
    )
    assert bytes_of((new, after.inner)) == bytes_of((w, state.inner))
    assert int(after.gate.skipped) == 1


def test_weights_are_judged_as_they_are_stored() -> None:
    """A proposal below half a step of bfloat16 is no other weight: its loss is the same."""
    seen = []

    def evaluate(w: Any, _: bool) -> Any:
        seen.append(w.dtype)
        return jnp.sum(w.astype(jnp.float32)), None

    opt, w = wrap(annealed(gaussian(1e-4), COLD), "pure-bf16"), jnp.ones(8, jnp.bfloat16)
    new, state = opt.step(jnp.zeros(8), opt.init(w), w, value=jnp.float32(8), evaluate=evaluate)
    assert seen == [jnp.bfloat16]
    assert bytes_of(new) == bytes_of(w) and int(state.inner.accepted) == 1


def test_decisions_in_bfloat16_would_be_others() -> None:
    """Losses near 5 that differ by some ten-thousandths, and a temperature of one."""
    opt, w = wrap(annealed(gaussian(1e-3), affine(1e-4, 1.0)), "fp32"), jnp.ones(64)
    first = opt.init(w)

    def decisions(rounded: Any) -> np.ndarray:
        def loss(w: Any) -> Any:
            return rounded(5 + jnp.mean(jnp.square(w)) - 1)

        def one(key: Any) -> Any:
            inner = first.inner._replace(key=jax.random.key_data(key))
            zeros = jnp.zeros(64)
            _, state = opt.step(
                zeros, first._replace(inner=inner), w, value=loss(w),
                evaluate=lambda w, _: (loss(w), None),
            )  # fmt: skip
            return state.inner.accepted

        keys = jax.random.split(jax.random.key(0), 2000)
        return np.asarray(jax.jit(jax.vmap(one))(keys))

    exact = decisions(lambda x: x)
    assert 0.2 < exact.mean() < 0.95
    low = decisions(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32))
    assert np.mean(low != exact) > 0.2


def products(step: Any, state: Any) -> int:
    text = str(jax.make_jaxpr(step.function)(state, data()))
    return text.count("dot_general[")


def test_proposals_without_gradients_have_no_backward_pass() -> None:
    def count(annealing: Any) -> int:
        opt = wrap(annealing, "fp32")
        return products(make_train_step(loss_fn, opt), init_state(weights(), opt))

    # the product of the loss and, with gradients, one more; before and after the proposal
    assert count(annealed(gaussian(0.1), HOT)) == 2
    assert count(annealed(random_rate([0.1]), HOT)) == 3
    assert count(annealed(langevin(0.1), HOT)) == 4
    # judged only in the branch of a proposal
    assert count(alternate(optax.sgd(0.1), annealed(gaussian(0.1), HOT), descend=1, anneal=1)) == 4


def test_hybrids_take_turns_and_each_state_stands_still_in_the_others_turn() -> None:
    inner = annealed(gaussian(1e-3), HOT)
    both = alternate(optax.adam(1e-2), inner, descend=2, anneal=1)
    states, metrics = trained(both, "fp16", steps=6)
    counts = [int(s.opt_state.inner.proposed) for s in states]
    assert counts == [0, 0, 0, 1, 1, 1, 2]
    adam = [int(optax.tree_utils.tree_get(s.opt_state.inner.descent, "count")) for s in states]
    assert adam == [0, 1, 2, 2, 3, 4, 4]
    grown = [int(s.opt_state.loss_scale.state[1]) for s in states]
    assert grown == adam  # steps without gradients say nothing about the scale
    assert [m["temperature"] for m in metrics] == [np.float32(1e6)] * 6
    then = anneal_then_descend(inner, optax.sgd(1e-2), after=2)
    counts = [int(s.opt_state.inner.proposed) for s in trained(then, steps=4)[0]]
    assert counts == [0, 1, 2, 2, 2]


def test_it_reheats_when_nothing_is_accepted_and_keeps_the_best() -> None:
    cooling = affine(1e-3, 0.5)
    states, metrics = trained(annealed(gaussian(1e3), cooling, reheat=3), steps=7)
    assert [int(s.opt_state.inner.age) for s in states] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [float(m["acceptance"]) for m in metrics] == [0.0] * 7
    states, metrics = trained(annealed(gaussian(0.05), affine(1e3, 1.0)), steps=40)
    best = [float(m["best_loss"]) for m in metrics]
    assert best == sorted(best, reverse=True) and best[-1] < best[0]
    last = states[-1].opt_state.inner
    at = best.index(best[-1])
    assert float(loss_fn(last.best, data(at))[0]) == pytest.approx(best[-1], rel=1e-6)


def test_annealing_finds_what_descent_finds() -> None:
    both = alternate(optax.sgd(0.05), annealed(gaussian(1e-2), affine(0.1, 0.9)),
                     descend=1, anneal=1)  # fmt: skip
    _, metrics = trained(both, steps=120)
    assert metrics[-1]["loss"] < 0.02 * metrics[0]["loss"]


def test_a_decoder_anneals() -> None:
    """All precisions, on one device and on a mesh: `python -m benchmarks.numerics.methods`."""
    mesh = "data=2,fsdp=2,tensor=2"
    model = decoder("tiny", "fp16", layers=2, width=16, heads=2, context=8, vocabulary=32)
    both = alternate(optax.adam(1e-2), annealed(langevin(1e-4), affine(1e-3, 0.9)),
                     descend=2, anneal=1)  # fmt: skip
    state, step = build(model, both, mesh, clip=1.0)
    ids = jax.random.randint(jax.random.key(0), (8, 9), 0, 32)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
    assert step.compiled._cache_size() == 1
    assert int(state.opt_state.inner.proposed) == 6


def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    opt = wrap(alternate(optax.adam(1e-2), annealed(gaussian(0.1), affine(0.1, 0.9), reheat=2),
                         descend=1, anneal=2), "pure-bf16-sr moments=int8@256")  # fmt: skip
    step = make_train_step(loss_fn, opt)

    def run(state: Any, seeds: range) -> Any:
        for seed in seeds:
            state, _ = step(state, data(seed))
        return state

    start = lambda: init_state(weights(jnp.bfloat16), opt)  # noqa: E731
    whole = run(start(), range(8))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, run(start(), range(5)), {})
    half, _, _ = CheckpointReader(tmp_path).restore(start())
    assert bytes_of(run(half, range(5, 8))) == bytes_of(whole)
    assert int(whole.opt_state.inner.accepted) > 0
