"""Stored answers: the divergence seen through K classes, files that are asked once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, logsumexp

from mpjax.data import bucket_batches
from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError
from mpjax.models import decoder, encoder
from mpjax.tasks import Distillation, Language, TextClassification, TokenClassification, divergence
from mpjax.tasks.distill import answers as room
from mpjax.tasks.distill.answers import bucketed, likeliest
from mpjax.tasks.distill.divergence import between
from mpjax.train import build

pytestmark = pytest.mark.usefixtures("fast_compile")

DRAW = np.random.default_rng(0)
V = 40
SMALL: Any = dict(width=16, heads=2, vocabulary=V)


def stored(logits: Any, temperature: float, top: int) -> dict[str, Any]:
    ids, logs, rest = likeliest(jnp.asarray(logits), temperature, top)
    return {
        "teacher_ids": ids, "teacher_logs": np.asarray(logs).astype(np.float16),
        "teacher_rest": rest,
    }  # fmt: skip


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("top", [1, 8, V])
def test_the_divergence_is_that_of_the_classes_that_are_kept(temperature: float, top: int) -> None:
    t, s = (3 * DRAW.normal(size=(6, 5, V)).astype(np.float32) for _ in range(2))
    log_q, log_p = bucketed(jnp.asarray(s), stored(t, temperature, top), temperature)
    found = np.asarray(between(log_q, log_p, "forward", 0.5))
    # by hand, in float64: the largest, and all others as one class
    p, q = (log_softmax(x.astype(np.float64) / temperature, -1) for x in (t, s))
    order = np.argsort(-t, -1)
    seen = [np.take_along_axis(x, order, -1) for x in (p, q)]
    kept = [x[..., :top] for x in seen]
    if top < V:
        kept = [
            np.concatenate([k, logsumexp(x[..., top:], -1, keepdims=True)], -1)
            for k, x in zip(kept, seen, strict=True)
        ]
    right = (np.exp(kept[0]) * (kept[0] - kept[1])).sum(-1)
    # logarithms of at most 16 in float16 move by 1/256 and are weighed by p
    np.testing.assert_allclose(found, right, atol=4e-3)
    whole = np.asarray(divergence(jnp.asarray(s), jnp.asarray(t), temperature=temperature))
    assert (found <= whole / temperature**2 + 4e-3).all()
    if top == 1:
        assert found.mean() < 0.8 * whole.mean() / temperature**2  # it does see less
    grad = jax.grad(
        lambda s: jnp.sum(
            between(*bucketed(s, stored(t, temperature, top), temperature), "forward", 0.5)
        )
    )(jnp.asarray(s))
    assert np.isfinite(grad).all()


def windows(count: int = 12, length: int = 8) -> list[dict[str, Any]]:
    ids = np.random.default_rng(1).integers(1, V, (count, length + 1)).astype(np.int32)
    return [{"inputs": row[:-1], "targets": row[1:]} for row in ids]


def speakers() -> tuple[Any, Any, Any]:
    teacher, student = (decoder("tiny", layers=n, context=8, **SMALL) for n in (2, 1))
    return teacher, jax.tree.map(lambda w: 4 * w, teacher.init(jax.random.key(7))), student


def test_a_student_learns_from_what_is_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_CHUNK", 5)
    teacher, held, student = speakers()
    live = Distillation(Language(), teacher, held, hard=0.5)
    options: Any = dict(batch=4, lengths=(8,), top=V)
    caplog.set_level(logging.INFO, logger="mpjax.tasks")
    found = live.answers(windows(), tmp_path, **options)
    assert "12 of 12 examples were asked" in caplog.messages[-1]
    assert len(list(tmp_path.glob("answers-*.npy"))) == 3
    assert (found[7]["inputs"] == windows()[7]["inputs"]).all() and len(found[3:5]) == 2
    # again: nothing is asked; one file lost: only its examples are
    live.answers(windows(), tmp_path, **options)
    assert "0 of 12 examples were asked" in caplog.messages[-1]
    lost = sorted(tmp_path.glob("answers-*.npy"))[0]
    content = lost.read_bytes()
    lost.write_bytes(content[:-3] + b"abc")  # damaged: set aside and asked again
    found = live.answers(windows(), tmp_path, **options)
    assert "of 12 examples were asked" in caplog.messages[-1] and lost.read_bytes() == content
    assert caplog.messages[-1].split()[1] in ("5", "2")
    # other weights, temperature or examples are other answers
    other = jax.tree.map(lambda w: w + 1, held)
    for changed in (
        lambda: Distillation(Language(), teacher, other).answers(windows(), tmp_path, **options),
        lambda: Distillation(Language(), teacher, held, temperature=3.0).answers(
            windows(), tmp_path, **options),
        lambda: live.answers(windows(), tmp_path, **(options | {"top": 8})),
    ):  # fmt: skip
        changed()
        assert "12 of 12 examples were asked" in caplog.messages[-1]

    ends = []
    for task in (live, Distillation(Language(), hard=0.5)):
        batches = bucket_batches(found, batch=4, seed=0, lengths=(8,))
        state, step = build(student, optax.adam(1e-2), objective=task.objective, accumulate=2)
        assert (step.frozen is None) == (task.teacher is None)
        losses = []
        for _ in range(6):
            state, metrics = step(state, next(batches))
            losses.append(float(metrics["loss"]))
        ends.append(losses)
    assert ends[0][-1] < ends[0][0]
    np.testing.assert_allclose(ends[1], ends[0], rtol=2e-3)  # float16 logarithms


@pytest.mark.parametrize("kind", ["text", "token"])
def test_classifiers_and_taggers(kind: str, tmp_path: Path) -> None:
    names = ("a", "b", "c")
    head = "class" if kind == "text" else "token"
    model = encoder("bert-tiny", layers=1, head=head, classes=3, dropout=0.0, **SMALL)
    held, params = (jax.tree.map(lambda w: 4 * w, model.init(jax.random.key(n))) for n in (7, 1))
    task: Any = TextClassification(names) if kind == "text" else TokenClassification(names)
    draw, examples = np.random.default_rng(2), []
    for length in (3, 6, 4, 2, 6):
        ids = draw.integers(1, V, length).astype(np.int32)
        labels = np.where(np.arange(length) == 1, IGNORE, 1).astype(np.int32)
        examples.append({
            "ids": ids, "keep": np.ones(length, bool),
            "labels": np.int32(2) if kind == "text" else labels,
        })  # fmt: skip
    live = Distillation(task, model, held)
    found = live.answers(examples, tmp_path, batch=2, lengths=(4, 6))
    batch = next(bucket_batches(found, batch=5, seed=0, lengths=(6,)))
    assert batch["teacher_ids"].shape == (5, 6, 3)
    losses = [float(one.objective(model)(params, batch)[0]) for one in (live, Distillation(task))]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    again = float(live.objective(model)(params, batch | {"ids": batch["ids"][::-1]})[0])
    assert again != pytest.approx(losses[0], rel=1e-2)  # which answers are whose does matter


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    teacher, held, student = speakers()
    live, alone = Distillation(Language(), teacher, held), Distillation(Language())
    options: Any = dict(batch=4, lengths=(8,))
    params = student.init(jax.random.key(0))
    batch = {name: np.stack([w[name] for w in windows()]) for name in ("inputs", "targets")}
    wide = {
        "teacher_ids": np.zeros((12, 8, 50), np.int32),
        "teacher_logs": np.zeros((12, 8, 50), np.float16),
        "teacher_rest": np.zeros((12, 8), np.float32),
    }
    folder = tmp_path / "file"
    folder.write_text("")
    for call, message in (
        (lambda: live.answers([], tmp_path, **options), "answers: no examples"),
        (lambda: live.answers(windows(), tmp_path, top=0, **options), "top=0 is no whole number"),
        (lambda: live.answers(windows(length=9), tmp_path, **options), "has 9 tokens, the longest"),
        (lambda: live.answers([{"inputs": np.ones(3)}], tmp_path, **options), "has no 'targets'"),
        (lambda: live.answers(windows(), folder / "x", **options), "cannot be written"),
        (lambda: alone.answers(windows(), tmp_path, **options), "there is no teacher to ask"),
        (lambda: alone.objective(student)(params, batch), "no 'teacher_ids' and there is no"),
        (lambda: alone.objective(student)(params, batch | wide), "both need one vocabulary"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
