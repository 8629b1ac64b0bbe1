"""The moving average of weights that an objective reads: against NumPy, skips, meshes, restarts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.models import encoder
from mpjax.ops import Objective, Terms, rows_alike
from mpjax.optim import float32_view, wrap
from mpjax.precision import get_schedule
from mpjax.tasks import Adversarial, TextClassification
from mpjax.tasks.adversarial import SMART
from mpjax.train import build, init_state, make_train_step, with_weights
from tests.tasks.adversarial.mean import batch_of

pytestmark = pytest.mark.usefixtures("fast_compile")
DECAY = 0.75
START = {"a": np.arange(8, dtype=np.float32) / 7, "b": np.ones((2, 4), np.float32)}


def terms(params: Any, batch: Any, *, average: Any, state: Any, key: Any, train: bool) -> Terms:
    """Weights are drawn to a batch's mean; how far they are from the average is reported."""
    del key, train
    apart = sum(
        jnp.sum(jnp.abs(w - a)).astype(jnp.float32)
        for w, a in zip(jax.tree.leaves(params), jax.tree.leaves(average), strict=True)
    )
    loss = sum(jnp.mean(jnp.square(w.astype(jnp.float32) - jnp.mean(batch["x"])))
               for w in jax.tree.leaves(params))  # fmt: skip
    dtypes = {w.dtype for w in jax.tree.leaves(average)}
    assert dtypes == {w.dtype for w in jax.tree.leaves(params)}
    return Terms({"loss": loss}, state, {"apart": apart})


def started(precision: str, average: bool = True, **options: Any) -> tuple[Any, Any]:
    objective = Objective.of_terms(terms, rows_alike, average=DECAY)
    optimizer = wrap(optax.sgd(0.3), precision)
    dtype = {"pure-bf16-sr": jnp.bfloat16, "O2": jnp.float16}.get(precision, jnp.float32)
    params = jax.tree.map(lambda x: jnp.asarray(x).astype(dtype), START)
    state = init_state(params, optimizer, average=average)
    return state, make_train_step(objective, optimizer, **options)


def wide(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(x).astype(np.float64) for name, x in tree.items()}


@pytest.mark.parametrize(
    ("precision", "accumulate"), [("fp32", 1), ("fp16", 2), ("O2", 1), ("pure-bf16-sr", 2)]
)
def test_it_follows_the_weights_and_stands_still_at_a_skip(precision: str, accumulate: int) -> None:
    state, step = started(precision, accumulate=accumulate)
    right, told = wide(state.average), []
    for name, w in wide(state.params).items():
        assert np.array_equal(right[name], w)
    for mean in (4.0, np.nan, -2.0, 3.0, 1.0):
        before = jax.device_get(state.average)
        assert {x.dtype for x in jax.tree.leaves(before)} == {np.dtype("float32")}
        skipped = int(state.opt_state.gate.skipped)
        state, metrics = step(state, {"x": jnp.full(4, mean, jnp.float32)})
        told.append(float(metrics["apart"]))
        if int(metrics["skipped"]) > skipped:
            same = jax.tree.map(np.array_equal, jax.device_get(state.average), before)
            assert jax.tree.all(same)
            continue
        full = wide(float32_view(state.params, state.opt_state.update_state))
        right = {n: DECAY * a + (1 - DECAY) * full[n] for n, a in right.items()}
        for name, a in wide(state.average).items():
            np.testing.assert_allclose(a, right[name], rtol=1e-6, atol=1e-6)
    assert int(state.opt_state.gate.skipped) >= 1 and step.compiled._cache_size() == 1
    assert told[0] == 0 and told[-1] > 0.1  # at first it is the weights


def test_sixteen_bits_would_stand_still() -> None:
    """The control: an average in bfloat16 does not take steps of a hundredth of a small change."""
    a, w = jnp.bfloat16(1.0), jnp.bfloat16(1.25)
    assert (a + jnp.bfloat16(0.01) * (w - a)) == a


def smart(mesh: str | None, precision: str = "fp32", **options: Any) -> tuple[Any, Any]:
    model = encoder(
        "bert-tiny", precision, layers=1, width=16, heads=2, vocabulary=40, head="class", classes=3
    )
    task = Adversarial(TextClassification(tuple("abc")), SMART(proximal=5.0, decay=0.5), (2,))
    return build(model, optax.sgd(0.1), mesh, objective=task.objective, **options)


@pytest.fixture(scope="module")
def on_mesh(fast_compile: None) -> Any:
    """The step on eight devices."""
    return smart("data=2,fsdp=2,tensor=2")[1]


def test_on_a_mesh_it_is_cut_like_its_weights_and_comes_to_the_same(on_mesh: Any) -> None:
    ends, told = [], []
    for state, step in (smart(None), (on_mesh.init(0), on_mesh)):
        for n in range(6):
            state, metrics = step(state, batch_of(8, seed=n))
        ends.append(jax.device_get(state.average))
        told.append(float(metrics["loss/proximal"]))
    cuts = jax.tree.map(lambda a, w: a.sharding == w.sharding, state.average, state.params)
    assert jax.tree.all(cuts) and step.compiled._cache_size() == 1
    assert told[0] == pytest.approx(told[1], rel=1e-3) and told[0] > 1e-4
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)  # sums of another order, over six steps


def test_other_weights_begin_their_own_average(on_mesh: Any) -> None:
    state, step = on_mesh.init(1), on_mesh
    given = jax.tree.map(lambda w: w + 1, state.params)
    begun = with_weights(state, given, step.optimizer.init(given))
    for a, w in zip(jax.tree.leaves(begun.average), jax.tree.leaves(given), strict=True):
        assert np.array_equal(a, w) and a.sharding == w.sharding
    begun, metrics = step(begun, batch_of(8))  # which donates both
    assert float(metrics["loss/proximal"]) < 1e-10
    head = [jax.tree.leaves(tree["encoder"]["class"]) for tree in (begun.average, begun.params)]
    assert not any(map(np.array_equal, *head))


def test_a_schedule_of_precision_carries_it_over() -> None:
    state, step = smart(None, schedule=get_schedule("late:fp32:bf16:0.5").over(4))
    kept = []
    for n in range(4):
        state, metrics = step(state, batch_of(8, seed=n))
        kept.append(float(metrics["loss/proximal"]))
    assert kept[0] < 1e-10 < min(kept[1:])  # two passes are fused in ways of their own


def test_a_state_without_it_is_refused() -> None:
    state, step = started("fp32", average=False)
    with pytest.raises(ConfigError, match="pass average=True to init_state"):
        step(state, {"x": jnp.ones(4)})
