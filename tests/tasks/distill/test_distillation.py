"""Distillation: its loss by hand, the teacher's part in the step, students that learn from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError
from mpjax.models import decoder, encoder, quantize_weights, recurrent, seq2seq
from mpjax.precision import late
from mpjax.tasks import (
    Distillation,
    Language,
    TextClassification,
    TokenClassification,
    divergence,
    label_loss,
)
from mpjax.train import build
from tests.tasks.bag import Bag

pytestmark = pytest.mark.usefixtures("fast_compile")

CLASSES = ("a", "b", "c")
SMALL = dict(width=16, heads=2, vocabulary=40)


def texts(rows: int = 8, length: int = 6, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    keep = np.arange(length) < rng.integers(2, length + 1, (rows, 1))
    return {
        "ids": rng.integers(1, 40, (rows, length)).astype(np.int32),
        "types": np.zeros((rows, length), np.int32),
        "keep": keep,
        "labels": rng.integers(0, 3, rows).astype(np.int32),
    }


def classifiers() -> tuple[Any, Any, Any, Any]:
    shape: Any = SMALL | dict(head="class", classes=3, dropout=0.1)
    teacher, student = (encoder("bert-tiny", layers=n, **shape) for n in (2, 1))
    return teacher, teacher.init(jax.random.key(7)), student, student.init(jax.random.key(1))


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen-shannon"])
def test_the_loss_of_a_classifier_is_the_sum_of_its_parts(kind: str) -> None:
    teacher, held, student, params = classifiers()
    task = TextClassification(CLASSES)
    own = Distillation(task, teacher, held, temperature=3.0, soft=0.7, hard=0.4, kind=kind)
    batch = texts()
    inputs = {name: batch[name] for name in ("ids", "types", "keep")}
    s, t = (m.apply(p, inputs)[0]["class"] for m, p in ((student, params), (teacher, held)))
    right = 0.7 * divergence(s, t, temperature=3.0, kind=kind).mean()
    right += 0.4 * label_loss(s, batch["labels"], student.precision.policy("encoder/loss"))
    objective = own.objective(student)
    assert float(objective(params, batch)[0]) == pytest.approx(float(right), rel=1e-6)
    # in training the student has dropout and the teacher none
    keys = [jax.random.key(n) for n in (0, 1)]
    noisy = [float(objective(params, batch, key=key, train=True)[0]) for key in keys]
    assert noisy[0] != noisy[1]
    silent = dataclasses.replace(student, config=dataclasses.replace(student.config, dropout=0.0))
    found = own.objective(silent)(params, batch, key=keys[0], train=True)[0]
    assert float(found) == pytest.approx(float(right), rel=1e-6)


def test_positions_without_a_target_count_for_nothing() -> None:
    heads = {"token": 3}
    teacher, student = Bag(40, heads), Bag(40, heads)
    held, params = teacher.init(jax.random.key(5)), student.init(jax.random.key(1))
    batch = texts()
    labels = np.where(batch["keep"], 1, IGNORE).astype(np.int32)
    labels[:, 1] = IGNORE  # a continuation, which is no target
    objective = Distillation(TokenClassification(CLASSES), teacher, held, hard=0.0).objective(
        student
    )  # type: ignore[arg-type]

    def loss(batch: Any) -> float:
        return float(objective(params, batch)[0])

    batch["labels"] = labels
    inputs = {name: batch[name] for name in ("ids", "types", "keep")}
    s, t = (m.apply(p, inputs)[0]["token"] for m, p in ((student, params), (teacher, held)))
    each = np.asarray(divergence(s, t, temperature=2.0))
    assert loss(batch) == pytest.approx(each[labels != IGNORE].mean(), rel=1e-5)
    assert loss(batch) != pytest.approx(each.mean(), rel=1e-3)
    unlabelled = {name: x for name, x in batch.items() if name != "labels"}
    assert loss(unlabelled) == pytest.approx(each[batch["keep"]].mean(), rel=1e-5)


def tokens(seed: int = 0, rows: int = 8, length: int = 8) -> dict[str, Any]:
    ids = np.random.default_rng(seed).integers(1, 40, (rows, length + 1)).astype(np.int32)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def speakers(name: str) -> tuple[Any, Any, dict[str, Any]]:
    if name == "seq2seq":
        make = lambda n: seq2seq("seq2seq-tiny", layers=n, **SMALL)  # noqa: E731
        batch = tokens() | {"source": tokens(1)["inputs"]}
        return make(2), make(1), batch
    teacher = decoder("tiny", layers=2, context=8, **SMALL)
    if name == "recurrent":
        return teacher, recurrent("tiny", width=16, vocabulary=40), tokens()
    return teacher, decoder("tiny", layers=1, context=8, **SMALL), tokens()


@pytest.mark.parametrize("name", ["decoder", "recurrent", "seq2seq"])
def test_a_language_model_learns_from_another(name: str) -> None:
    teacher, student, batch = speakers(name)
    held, params = teacher.init(jax.random.key(7)), student.init(jax.random.key(1))
    weights = np.ones((8, 8), np.float32)
    weights[:, 0] = 0
    batch = {name: jnp.asarray(x) for name, x in (batch | {"weights": weights}).items()}
    own = Distillation(Language(), teacher, held, temperature=1.0, soft=1.0, hard=0.5)
    take = (lambda m, p: m.apply(p, batch)) if name == "seq2seq" else (
        lambda m, p: m.apply(p, batch["inputs"]))  # fmt: skip
    s, t = take(student, params)[0], take(teacher, held)[0]
    right = float(divergence(s, t)[:, 1:].mean()) + 0.5 * float(student.loss(params, batch)[0])
    objective = own.objective(student)
    assert float(objective(params, batch)[0]) == pytest.approx(right, rel=1e-5)


def test_microbatches_weigh_by_their_targets() -> None:
    teacher, held, student, _ = classifiers()
    silent = dataclasses.replace(student, config=dataclasses.replace(student.config, dropout=0.0))
    batch = texts()
    batch["labels"][:3] = IGNORE  # all in other microbatches' rows than the rest
    task = Distillation(TextClassification(CLASSES), teacher, held)
    ends = []
    for accumulate in (1, 4):
        state, step = build(silent, optax.sgd(0.1), objective=task.objective, accumulate=accumulate)
        state, metrics = step(state, batch)
        ends.append((jax.device_get(state.params), float(metrics["loss"])))
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)
    for a, b in zip(*(jax.tree.leaves(end[0]) for end in ends), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_teacher_is_an_argument_of_the_step_and_has_no_backward_pass() -> None:
    teacher, held, student, _ = classifiers()
    task = Distillation(TextClassification(CLASSES), teacher, held, hard=0.0)
    state, step = build(student, optax.sgd(0.1), objective=task.objective)
    text = step.compiled.lower(state, texts()).as_text()
    # as constants, its table of 40 x 16 numbers would stand in the text
    assert len(text) < 300_000 and 'dense<"0x' not in text
    arrays = jax.tree.leaves(held)
    before = [np.asarray(x).tobytes() for x in arrays]
    for seed in range(3):
        state, _ = step(state, texts(seed=seed))
    assert [np.asarray(x).tobytes() for x in arrays] == before  # neither moved nor donated

    def loss(held: Any) -> Any:
        return task.objective(student).bound(held).loss(state.params, texts())[0]

    grads = jax.grad(loss)(held)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("precision", "mesh", "storage"),
    [
        ("fp16", None, ""),
        ("fp16", None, "int4@16"),
        ("bf16", "data=2,fsdp=2,tensor=2", "int8"),
    ],
)
def test_students_of_any_precision_learn_from_stored_teachers(
    precision: str, mesh: str | None, storage: str
) -> None:
    teacher = decoder("tiny", "bf16", layers=2, context=8, **SMALL)
    held: Any = teacher.init(jax.random.key(7))
    held = jax.tree.map(lambda w: 4 * w, held)  # so that it has something to say
    if storage:
        held = quantize_weights(held, storage)
    student = decoder("tiny", precision, layers=1, context=8, **SMALL)
    task = Distillation(Language(), teacher, held, hard=0.0, temperature=1.0)
    state, step = build(student, optax.adam(1e-2), mesh, objective=task.objective)
    losses = []
    for _ in range(30):
        state, metrics = step(state, tokens())
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < 0.5 * losses[0]
    assert step.compiled._cache_size() == 1


def test_a_schedule_of_precision_distils_too() -> None:
    teacher, held, student, _ = classifiers()
    task = Distillation(TextClassification(CLASSES), teacher, held)
    schedule = late("fp32", "bf16", last=0.5, steps=4)
    student = dataclasses.replace(student, precision=schedule.first)
    state, step = build(student, optax.sgd(0.1), objective=task.objective, schedule=schedule)
    for seed in range(4):
        state, metrics = step(state, texts(seed=seed))
    assert np.isfinite(float(metrics["loss"])) and int(state.step) == 4


def test_mistakes_are_one_line() -> None:
    teacher, held, student, params = classifiers()
    task = TextClassification(CLASSES)
    four = encoder("bert-tiny", head="class", classes=4, layers=1, **SMALL)
    speaks = decoder("tiny", layers=1, context=8, **SMALL)
    for call, message in (
        (lambda: Distillation(task, teacher, held, temperature=-1), "temperature=-1 is not a"),
        (lambda: Distillation(task, teacher, held, soft=0.0), "soft=0 leaves the teacher out"),
        (lambda: Distillation(task, teacher, held, hard=-1.0), "hard=-1.0 is not 0 or a number"),
        (lambda: Distillation(task, speaks, held), "teacher is 'Decoder', and TextClassification"),
        (lambda: Distillation("sst2", teacher, held), "the task is 'sst2'; give TextClass"),  # type: ignore[arg-type]
        (lambda: Distillation(Language(), teacher, held), "and Language takes a language model"),
        (lambda: Distillation(task, four, four.init(jax.random.key(0))).objective(student)(
            params, texts()), "student has 3 classes or tokens, the teacher 4; both need"),
        (lambda: Distillation(task, teacher, held).objective(student)(
            params, {"ids": np.ones((1, 4), np.int32)}), "holds ids and no 'labels'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
