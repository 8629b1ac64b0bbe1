"""Several tasks over one encoder: losses by hand, microbatches, scales, skips, meshes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax import ops
from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError
from mpjax.models import encoder
from mpjax.models.hf import save_checkpoint
from mpjax.optim import wrap
from mpjax.precision import get_precision
from mpjax.tasks import (
    Distillation,
    GradNorm,
    MaskedLanguage,
    Mixture,
    TextClassification,
    TextRegression,
    TokenClassification,
)
from mpjax.train import build, init_state, make_train_step
from mpjax.train.gradients import COMBINED
from tests.tasks.bag import Bag
from tests.tasks.mixture.test_task_gradients import orders, surgery
from tests.train.meshes import host

pytestmark = pytest.mark.usefixtures("fast_compile")

B, T = 12, 6
DRAW = np.random.default_rng(0)
TASK = np.array([0, 1, 1, 2, 0, 1, 2, 2, 1, 1, 1, 0], np.int32)
KEEP = np.arange(T) < DRAW.integers(2, T + 1, (B, 1))
IDS = DRAW.integers(0, 20, (B, T)).astype(np.int32)
INPUTS = {"ids": IDS, "types": np.zeros((B, T), np.int32), "keep": KEEP}
BATCH = INPUTS | {
    "task": TASK,
    "mood/labels": np.where(TASK == 0, IDS[:, 0] % 2, IGNORE).astype(np.int32),
    "tags/labels": np.where((TASK == 1)[:, None] & KEEP, IDS % 3, IGNORE).astype(np.int32),
    "score/values": np.where(TASK == 2, IDS[:, 0] / 10, 0).astype(np.float32),
    "score/weights": (TASK == 2).astype(np.float32),
}
TASKS: dict[str, Any] = {
    "mood": TextClassification(("bad", "good"), output="class"),
    "tags": TokenClassification(("N", "V", "X"), output="token"),
    "score": TextRegression(output="next"),
}
HEADS = {"class": 2, "token": 3, "next": 1}
MODEL: Any = Bag(20, HEADS)
EVERYTHING: dict[str, Any] = dict(weighting="gradnorm", conflicts="pcgrad", own_scales=True)


def alone(name: str) -> dict[str, Any]:
    """The rows of one task, as its own objective reads them."""
    rows = list(TASKS).index(name) == TASK
    own = {n.removeprefix(f"{name}/"): x for n, x in BATCH.items() if n.startswith(f"{name}/")}
    return {n: x[rows] for n, x in (INPUTS | own).items()}


def test_each_loss_is_that_of_its_task_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = Bag.apply
    monkeypatch.setattr(Bag, "apply", lambda *a, **o: calls.append(1) or forward(*a, **o))
    params = MODEL.init(jax.random.key(1))
    weights = {"tags": 0.25, "mood": 2.0, "score": 1.0}
    objective = Mixture(TASKS, weights).objective(MODEL)
    assert objective.combine is None and objective.init is None and objective.frozen is None
    losses = jax.jit(lambda p: objective.terms(p, BATCH).losses)(params)  # type: ignore[misc]
    assert len(calls) == 1, "one forward pass for all"
    for name, task in TASKS.items():
        own = task.objective(MODEL)
        want = jax.jit(lambda p, own=own, name=name: own(p, alone(name))[0])(params)
        assert float(losses[name]) == pytest.approx(weights[name] * float(want), rel=1e-6), name
    counts = {name: float(n) for name, n in objective.count(BATCH).items()}  # type: ignore[union-attr]
    assert counts == {"mood": 3, "tags": float((BATCH["tags/labels"] >= 0).sum()), "score": 3}


def test_uncertainty_learns_the_papers_weights() -> None:
    params = MODEL.init(jax.random.key(1))
    objective = Mixture(TASKS, weighting="uncertainty").objective(MODEL)
    assert objective.init is not None and objective.terms is not None
    s = {"mood": 0.4, "tags": -0.3, "score": 1.1}
    own = {"mixture": {"log_variance": {n: jnp.float32(x) for n, x in s.items()}}}
    first = objective.init(jax.random.key(0))
    assert jax.tree.structure(first) == jax.tree.structure(own)
    assert not any(jax.tree.leaves(first)), "the weight 1"
    plain = Mixture(TASKS).objective(MODEL).terms(params, BATCH).losses  # type: ignore[misc]
    value, grads = jax.value_and_grad(lambda p: objective(p, BATCH)[0])(params | own)
    half = {"mood": 1.0, "tags": 1.0, "score": 0.5}  # of a Gaussian's squared error
    terms = {n: half[n] * np.exp(-s[n]) * float(plain[n]) for n in s}
    assert float(value) == pytest.approx(sum(terms[n] + s[n] / 2 for n in s), rel=1e-6)
    for name, slope in grads["mixture"]["log_variance"].items():
        assert float(slope) == pytest.approx(0.5 - terms[name], rel=1e-5), name
    # a task that is not in the batch has no term and moves nothing
    absent = BATCH | {"mood/labels": np.full(B, IGNORE, np.int32)}
    slopes = jax.grad(lambda p: objective(p, absent)[0])(params | own)["mixture"]["log_variance"]
    assert float(slopes["mood"]) == 0 != float(slopes["tags"])


@pytest.mark.parametrize(
    "options", [{}, {"weighting": "uncertainty"}, EVERYTHING], ids=["fixed", "uncertainty", "all"]
)
def test_microbatches_give_the_weights_of_the_whole_batch(options: dict[str, Any]) -> None:
    found = []
    for accumulate in (1, 3):
        objective = Mixture(TASKS, **options).objective
        state, step = build(MODEL, optax.sgd(0.3), objective=objective, accumulate=accumulate)
        for _ in range(2):
            state, metrics = step(state, BATCH)
        found.append(host((state.params, state.combine, float(metrics["loss"]))))
    for whole, part in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(part, whole, rtol=1e-4, atol=2e-6)


def test_a_step_with_pcgrad_is_the_papers() -> None:
    """Through a loss scale, which must not show, and with plain descent, which hides nothing."""
    mixture = Mixture(TASKS, {"mood": 1.0, "tags": 3.0, "score": 2.0}, conflicts="pcgrad")
    objective = mixture.objective(MODEL)
    optimizer = wrap(optax.sgd(1.0), get_precision("fp32", loss_scale="static:256"))
    params = MODEL.init(jax.random.key(6))
    state = init_state(params, optimizer, seed=1)
    before = host(params)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 0)
    each = [
        jax.grad(lambda p, n=name: objective.terms(p, BATCH).losses[n])(params)  # type: ignore[misc]
        for name in TASKS
    ]
    shared = ("table", "types")
    flat = [np.concatenate([np.ravel(g[n]) for n in shared]).astype(np.float64) for g in each]
    turns = orders(jax.random.fold_in(key, COMBINED), 3)
    want = surgery(flat, turns)
    state, metrics = make_train_step(objective, optimizer)(state, BATCH)
    moved = [np.ravel(before[n] - np.asarray(state.params[n])) for n in shared]
    np.testing.assert_allclose(np.concatenate(moved), want, rtol=1e-4, atol=2e-6)
    assert np.abs(sum(flat) - want).max() > 1e-2, "or nothing was opposed"
    assert float(metrics["loss"]) == pytest.approx(sum(float(metrics[f"loss/{n}"]) for n in TASKS))
    shares = mixture.gradient_shares(MODEL)(before, BATCH)
    norms = [np.linalg.norm(g) for g in flat]
    assert shares["score"] == pytest.approx(norms[2] / sum(norms), rel=1e-5)
    assert min(v for n, v in shares.items() if n.startswith("cosine")) < 0


class Half(Bag):
    """The same, computed in float16 throughout."""

    def __init__(self, loss_scale: str):
        super().__init__(20, HEADS)
        self.precision = get_precision("fp16", loss_scale=loss_scale)

    def apply(self, params: Any, inputs: Any, **options: Any) -> Any:
        low = {n: p.astype(jnp.float16) for n, p in params.items() if n != "mixture"}
        return super().apply(low, inputs, **options)


@pytest.mark.parametrize("own_scales", [True, False])
def test_a_small_loss_learns_with_a_scale_of_its_own(own_scales: bool) -> None:
    """One at 2^-12, beside one that keeps the scale that both share small: the control."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 20, (64, 64)).astype(np.int32)
    tagged = np.arange(64) % 2 == 0
    batch = {
        "ids": ids, "types": np.zeros_like(ids), "keep": np.ones(ids.shape, bool),
        "tags/labels": np.where(tagged[:, None], ids % 3, IGNORE).astype(np.int32),
        "mood/labels": np.where(tagged, IGNORE, ids[:, 0] % 2).astype(np.int32),
    }  # fmt: skip
    model: Any = Half(f"dynamic:init=1,interval=5,min={2.0**-10}")
    weights = {"tags": 2.0**-12, "mood": 2.0**25}
    tasks = {name: TASKS[name] for name in weights}
    objective = Mixture(tasks, weights, own_scales=own_scales).objective
    state, step = build(model, optax.adam(0.03), objective=objective)
    losses, head = [], np.asarray(state.params["token"])
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss/tags"]) * 2**12)
    # the large loss has less than 1 of scale, in both arms
    assert float(metrics["loss_scale"]) < 1 and float(metrics["skipped"]) < 12
    assert losses[-1] < 0.6 * losses[0] if own_scales else losses[-1] > 0.8 * losses[0]
    # what still moves the loss is the embedding, which the other task trains
    assert np.array_equal(state.params["token"], head) == (not own_scales)
    if own_scales:
        told = [float(metrics[f"loss_scale/{n}"]) for n in weights]
        assert told[0] > 8 > 1 > told[1] == float(metrics["loss_scale"])


@functools.cache
def trained(mesh: str | None) -> tuple[Any, list[Any]]:
    """Two steps, one whose second loss overflows, and one more; states on the host."""
    model = encoder(
        "bert-tiny", get_precision("fp16", loss_scale="dynamic:init=256"), layers=1, width=16,
        heads=2, vocabulary=24, context=8, task_heads=("mood=class:2", "tags=token:4"),
    )  # fmt: skip
    tasks = {
        "mood": TextClassification(("bad", "good"), output="mood"),
        "tags": TokenClassification(("N", "V", "X"), output="tags"),
    }
    state, step = build(
        model, optax.adam(0.01), mesh, objective=Mixture(tasks, **EVERYTHING).objective
    )
    good = {n: x[:8] for n, x in BATCH.items() if not n.startswith("score")}
    states = []
    for number in range(4):
        if number > 1:  # the second scale leaves float16, and comes back
            leaves, structure = jax.tree.flatten(state.opt_state.loss_scale)
            leaves[3] = leaves[3] * 2.0 ** (16 if number == 2 else -15)
            scale = jax.tree.unflatten(structure, leaves)
            state = state._replace(opt_state=state.opt_state._replace(loss_scale=scale))
        state, metrics = step(state, good)
        states.append((host(state), host(metrics)))
    return step, states


def test_a_skipped_step_changes_the_scale_of_the_loss_at_fault_and_nothing_else() -> None:
    step, states = trained(None)
    (before, _), (after, metrics), (last, _) = states[1:]
    assert int(metrics["skipped"]) == 1 and int(last.opt_state.gate.skipped) == 1
    for part in ("params", "combine"):
        for a, b in zip(*(jax.tree.leaves(getattr(s, part)) for s in (before, after)), strict=True):
            assert a.tobytes() == b.tobytes(), part
    for a, b in zip(
        *(jax.tree.leaves((s.opt_state.inner, s.opt_state.update_state)) for s in (before, after)),
        strict=True,
    ):
        assert a.tobytes() == b.tobytes()
    scales = [s.opt_state.loss_scale.value.tolist() for s in (before, after)]
    assert scales == [[256, 256], [256, 2**23]]
    moved = [np.abs(a - b).max() for a, b in zip(last.combine, after.combine, strict=True)]
    assert moved[0] > 0, "or what a skip must not move does not move at all"
    assert step.compiled._cache_size() == 1


def test_a_mesh_gives_what_one_device_gives() -> None:
    (_, one), (step, many) = trained(None), trained("data=2,fsdp=2,tensor=2")
    assert step.compiled._cache_size() == 1
    for (a, told), (b, also) in zip(one[:3], many[:3], strict=True):
        assert float(told["loss"]) == pytest.approx(float(also["loss"]), rel=2e-3, nan_ok=True)
        np.testing.assert_allclose(a.combine.weights, b.combine.weights, rtol=1e-2)
        np.testing.assert_array_equal(a.opt_state.loss_scale.value, b.opt_state.loss_scale.value)


def test_precision_rules_reach_every_head() -> None:
    shape: Any = dict(layers=1, width=16, heads=2, vocabulary=24)
    heads = ("mood=class:2", "tags=token:3")
    fp8 = get_precision("fp8", rules=["encoder/task_heads/mood/head=fp32", "**/tags/head=fp8"])
    model = encoder("bert-tiny", fp8, task_heads=heads, **shape)
    assert {p for p in model.paths if "task_heads" in p and p.endswith("head")} == {
        "encoder/task_heads/mood/head", "encoder/task_heads/tags/head"
    }  # fmt: skip
    assert "encoder/task_heads/tags/head" in model.recipes
    assert "encoder/task_heads/mood/head" not in model.recipes
    with pytest.raises(ConfigError, match="matches no path"):
        encoder("bert-tiny", get_precision("fp8", rules=["**/x=fp32"]), task_heads=heads, **shape)
    params = model.init(jax.random.key(0))
    with pytest.raises(ConfigError, match="export: task_heads"):
        save_checkpoint("nowhere", model, params)
    same = encoder("bert-tiny", "fp32", **shape)
    alone, both = same.init(jax.random.key(0)), params["encoder"]
    assert (alone["encoder"]["embed"]["table"] == both["embed"]["table"]).all(), "the same draws"


BAD_HEADS = {
    ("tags=token",): "task head 'tags=token'", ("class=class:2",): "none of features",
    ("a=token:0",): "task head 'a=token:0'", ("a=words:2",): "task head 'a=words:2'",
    ("a=token:2", "a=class:2"): "two task heads are named 'a'", "a=token:2": "give such as",
}  # fmt: skip


@pytest.mark.parametrize("heads", BAD_HEADS)
def test_a_head_that_cannot_be_is_one_line(heads: Any) -> None:
    with pytest.raises(ConfigError, match=BAD_HEADS[heads]):
        encoder("bert-tiny", task_heads=heads)


ALL, PLAIN = Mixture(TASKS, **EVERYTHING), wrap(optax.sgd(0.1), "fp32")
WRONG: dict[str, tuple[Any, str]] = {
    "none": (lambda: Mixture({}), "no task"),
    "twice": (lambda: Mixture([("a", TASKS["mood"])] * 2), "two tasks are named 'a'"),
    "no pairs": (lambda: Mixture([TASKS["mood"]]), "give a dict"),  # type: ignore[list-item]
    "name": (lambda: Mixture({"a/b": TASKS["mood"]}), "the name 'a/b'"),
    "no task": (lambda: Mixture({"a": 3}), "a is 3; give a task"),  # type: ignore[dict-item]
    "negative": (lambda: Mixture(TASKS, {"mood": 1, "tags": 1, "score": -1}), "'score' is -1"),
    "missing": (lambda: Mixture(TASKS, {"mood": 1, "tags": 1}), "weights lack 'score'"),
    "unknown": (lambda: Mixture(TASKS, {"moot": 1}), "'moot', which is no task"),
    "weighting": (lambda: Mixture(TASKS, weighting="fxied"), "weighting='fxied' is unknown; known"),
    "conflicts": (lambda: Mixture(TASKS, conflicts="surgery"), "conflicts='surgery' is unknown"),
    "fields": (lambda: first({"ids": IDS}), "no field of 'mood', such as mood/labels"),
    "output": (
        lambda: first(BATCH, Mixture({"mood": TextClassification(("a", "b"), output="moods")})),
        "reads the output 'moods' and the model has class token next",
    ),
    "classes": (
        lambda: Mixture({"mood": TextClassification(("a", "b", "c"), output="mood")}).objective(
            encoder("bert-tiny", task_heads=("mood=class:2",))
        ), "the task has 3, the model's head 'mood' 2",
    ),
    "sum": (
        lambda: first(
            BATCH | {"mlm/labels": BATCH["tags/labels"], "mlm/next": BATCH["mood/labels"]},
            Mixture({"mlm": MaskedLanguage(outputs=("token", "class"))}),
        ), "sum of several losses, masked next; give each as a task",
    ),
    "delayed": (
        lambda: build(
            encoder("bert-tiny", "fp8-delayed", layers=1, width=16, heads=2, vocabulary=24),
            optax.sgd(0.1), objective=Mixture({"a": TASKS["mood"]}, own_scales=True).objective,
        ), "own_scales: each loss has its own loss scale, and delayed scaling",
    ),
    "leaf": (
        lambda: make_train_step(
            Mixture(TASKS, conflicts="pcgrad").objective(MODEL),
            wrap(optax.sgd(0.1), get_precision("fp16", loss_scale="leaf")),
        ), "leaf scales groups of weights",
    ),
    "logmax": (
        lambda: build(Half("logmax"), optax.sgd(0.1), objective=ALL.objective),
        "logmax reads the gradients of one loss",
    ),
    "no state": (
        lambda: make_train_step(Mixture(TASKS, weighting="gradnorm").objective(MODEL), PLAIN)(
            init_state(MODEL.init(jax.random.key(0)), PLAIN), BATCH
        ), "pass combine=objective.combine.init",
    ),
    "one scale": (
        lambda: make_train_step(
            Mixture(TASKS, own_scales=True).objective(MODEL), wrap(optax.sgd(0.1), "fp16")
        ), r"3 losses have one each and the optimizer has 0; write wrap\(..., losses=3\)",
    ),
}  # fmt: skip


def first(batch: Any, mixture: Mixture | None = None) -> Any:
    objective = (mixture or Mixture(TASKS)).objective(MODEL)
    objective.count(batch)
    return objective(MODEL.init(jax.random.key(0)), batch)


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_line(case: str) -> None:
    make, said = WRONG[case]
    with pytest.raises(ConfigError, match=said) as found:
        make()
    assert "\n" not in str(found.value)


def test_a_distilled_task_keeps_its_teacher_as_an_argument() -> None:
    held = MODEL.init(jax.random.key(5))
    soft = Distillation(TASKS["mood"], MODEL, held, hard=0.0)
    mixture = Mixture({"mood": soft, "tags": TASKS["tags"]}, weighting=GradNorm(alpha=0.5))
    batch = BATCH | {"mood/weights": (TASK == 0).astype(np.float32)}
    state, step = build(MODEL, optax.adam(0.01), objective=mixture.objective)
    assert step.frozen is not None and set(step.frozen) == {"mood"}
    first = step.optimizer.init(state.params)
    losses = []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss/mood"]))
    assert losses[-1] < 0.7 * losses[0] and first is not None
    assert float(metrics["weight/mood"]) != 1
    assert isinstance(Mixture(TASKS).objective(MODEL), ops.Objective)
