"""Hidden states and relations: by hand in float64, in the step, under every storage and mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax

from mpjax.errors import ConfigError
from mpjax.models import decoder, encoder, quantize_weights, recurrent, seq2seq
from mpjax.tasks import Distillation, Language, Mixture, TextClassification
from mpjax.tasks.distill.intermediates import even_layers, hidden_loss, relation_loss
from mpjax.train import build

pytestmark = pytest.mark.usefixtures("fast_compile")

DRAW = np.random.default_rng(0)
B, T, D, E, R = 2, 5, 8, 12, 4
STUDENT = DRAW.normal(size=(B, T, D)).astype(np.float32)
TEACHER = DRAW.normal(size=(B, T, E)).astype(np.float32)
KEEP = np.arange(T) < np.array([[5], [3]])


def relations(x: Any, causal: bool) -> Any:
    """Log-relations (B, R, T, T) in float64, by hand; padding is seen by nobody."""
    found = np.full((B, R, T, T), -np.inf)
    for b in range(B):
        for r in range(R):
            own = x[b].astype(np.float64).reshape(T, R, -1)[:, r]
            for t in range(T):
                sees = [s for s in range(T) if KEEP[b, s] and (s <= t or not causal)]
                scores = [own[t] @ own[s] / np.sqrt(own.shape[1]) for s in sees]
                found[b, r, t, sees] = log_softmax(scores)
    return found


@pytest.mark.parametrize("causal", [False, True])
def test_relations_are_those_of_the_paper(causal: bool) -> None:
    log_p, log_q = relations(TEACHER, causal), relations(STUDENT, causal)
    p = np.exp(log_p)
    each = np.where(p > 0, p * (np.where(p > 0, log_p, 0) - np.where(p > 0, log_q, 0)), 0).sum(-1)
    right = each.mean(1)[KEEP].mean()
    found = float(relation_loss(STUDENT, TEACHER, R, KEEP, causal))  # type: ignore[arg-type]
    assert found == pytest.approx(right, rel=1e-5)
    for wrong in (
        relation_loss(TEACHER, STUDENT, R, KEEP, causal),  # type: ignore[arg-type]
        relation_loss(STUDENT, TEACHER, R // 2, KEEP, causal),  # type: ignore[arg-type]
        relation_loss(STUDENT, TEACHER, R, np.ones_like(KEEP), causal),  # type: ignore[arg-type]
        relation_loss(STUDENT, TEACHER, R, KEEP, not causal),  # type: ignore[arg-type]
    ):
        assert abs(float(wrong) - right) > 0.01 * right


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_hidden_loss_is_a_mean_over_tokens_in_float32(dtype: str) -> None:
    projection = DRAW.normal(size=(D, E)).astype(np.float32)
    # differences whose squares float16 cannot hold
    s, t = (jnp.asarray(300 * x).astype(dtype) for x in (STUDENT, TEACHER))
    wide = [np.asarray(x).astype(np.float64) for x in (s, t)]
    right = ((wide[0] @ projection - wide[1]) ** 2).mean(-1)[KEEP].mean()
    found = hidden_loss(s, t, projection, KEEP.astype(np.float32))  # type: ignore[arg-type]
    assert float(found) == pytest.approx(right, rel=1e-5) and right > 65504
    junk = np.where(KEEP[..., None], np.asarray(s), np.inf).astype(dtype)  # at padding
    found, grad = jax.value_and_grad(hidden_loss)(junk, t, projection, KEEP.astype(np.float32))
    assert float(found) == pytest.approx(right, rel=1e-5)
    assert np.isfinite(grad.astype(np.float32)).all()


def test_layers_of_equal_depth() -> None:
    assert even_layers(3, 12) == ((0, 3), (1, 7), (2, 11))
    assert even_layers(4, 6) == ((0, 0), (1, 2), (2, 3), (3, 5))
    assert even_layers(2, 2) == ((0, 0), (1, 1))


SHAPE: Any = dict(vocabulary=40, head="class", classes=3, dropout=0.0)
TASK = TextClassification(("a", "b", "c"))


def pair(precision: str = "fp32") -> tuple[Any, Any, Any]:
    teacher = encoder("bert-tiny", layers=4, width=24, heads=4, **SHAPE)
    student = encoder("bert-tiny", precision, layers=2, width=16, heads=2, **SHAPE)
    return teacher, teacher.init(jax.random.key(7)), student


def texts(rows: int = 8) -> dict[str, Any]:
    draw = np.random.default_rng(1)
    keep = np.arange(6) < draw.integers(2, 7, (rows, 1))
    ids = draw.integers(1, 40, (rows, 6)).astype(np.int32)
    return {"ids": ids, "keep": keep, "labels": draw.integers(0, 3, rows).astype(np.int32)}


def test_a_student_takes_what_is_inside() -> None:
    """All precisions, on one device and on a mesh: `python -m benchmarks.numerics.methods`."""
    mesh = "data=2,fsdp=2,tensor=2"
    teacher, held, student = pair("fp16")
    own = Distillation(
        TASK, teacher, quantize_weights(held, "int8"), soft=0.0, hard=0.0, hidden=1.0,
        relations=1.0, relation_heads=4,
    )  # fmt: skip
    state, step = build(student, optax.adam(3e-2), mesh, objective=own.objective)
    assert {name: w.shape for name, w in state.params["distillation"].items()} == {
        "layer_0": (16, 24), "layer_1": (16, 24),
    }  # fmt: skip
    first = jax.device_get(state.params["distillation"])
    seen = []
    for _ in range(20):
        state, metrics = step(state, texts())
        seen.append([float(metrics[f"loss/{name}"]) for name in ("hidden", "relations")])
    assert np.isfinite(seen).all() and (np.array(seen[-1]) < 0.7 * np.array(seen[0])).all()
    assert step.compiled._cache_size() == 1
    moved, before = jax.device_get((state.params["distillation"], metrics["skipped"]))
    assert all((moved[name] != first[name]).any() for name in first)
    # a step that is skipped leaves the projections as they are, bit for bit
    encoder_ = state.params["encoder"]
    broken = encoder_ | {"norm_embed": jax.tree.map(lambda w: w * jnp.nan, encoder_["norm_embed"])}
    state, metrics = step(state._replace(params=state.params | {"encoder": broken}), texts())
    assert int(metrics["skipped"]) == 1 + before
    again = jax.device_get(state.params["distillation"])
    assert all(again[name].tobytes() == moved[name].tobytes() for name in moved)


def test_the_loss_in_the_step_is_of_the_named_layers() -> None:
    teacher, held, student = pair()
    params = student.init(jax.random.key(1))
    batch = texts()
    inputs = {name: batch[name] for name in ("ids", "keep")}
    both = [
        m.collecting("hidden").apply(p, inputs)[1]["collected"]["encoder"]["hidden"]
        for m, p in ((student, params), (teacher, held))
    ]
    for layers in (((0, 3),), ((1, 0), (0, 2))):
        own = Distillation(TASK, teacher, held, soft=0.0, hard=0.0, hidden=0.5, layers=layers)
        objective = own.objective(student)
        assert objective.init is not None
        drawn = objective.init(jax.random.key(2))
        right = np.mean([
            ((np.asarray(both[0][s], np.float64) @ np.asarray(drawn["distillation"][f"layer_{s}"])
              - np.asarray(both[1][t])) ** 2).mean(-1)[batch["keep"]].mean()
            for s, t in layers
        ])  # fmt: skip
        loss, state = objective(params | drawn, batch)
        assert float(loss) == pytest.approx(0.5 * right, rel=1e-4) and state is None


@pytest.mark.parametrize("name", ["decoder", "seq2seq"])
def test_language_models_too(name: str) -> None:
    shape: Any = dict(width=16, heads=2, vocabulary=40)
    ids = np.random.default_rng(0).integers(1, 40, (8, 9)).astype(np.int32)
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
    if name == "seq2seq":
        teacher, student = (seq2seq("seq2seq-tiny", layers=n, **shape) for n in (2, 1))
        batch["source"] = ids[:, :5]
    else:
        teacher, student = (decoder("tiny", layers=n, context=8, **shape) for n in (2, 1))
    held = teacher.init(jax.random.key(7))
    own = Distillation(
        Language(), teacher, held, hidden=0.1, relations=1.0, relation_heads=2, soft=0.5
    )
    state, step = build(student, optax.adam(1e-2), objective=own.objective, accumulate=2)
    losses = []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_without_them_the_program_is_that_of_no_collecting() -> None:
    teacher, held, student = pair()
    params, inputs = student.init(jax.random.key(1)), texts()["ids"]
    texts_of = [
        jax.jit(lambda p, x, m=m: m.apply(p, x)[0]).lower(params, inputs).as_text()
        for m in (student, student.collecting("hidden", "queries"))
    ]
    assert texts_of[0] == texts_of[1]  # what is not read is not in the program either
    del teacher, held


def test_mistakes_are_one_line() -> None:
    teacher, held, student = pair()
    speaks = decoder("tiny", layers=2, width=16, heads=2, vocabulary=40)
    network = recurrent("tiny", width=16, vocabulary=40)
    own = Distillation(TASK, teacher, held, hidden=1.0)
    change = lambda **new: dataclasses.replace(own, **new).objective(student)  # noqa: E731
    for call, message in (
        (lambda: change(layers=((2, 0),)), "layer 2 of the student, which has 2; give 0 to 1"),
        (lambda: change(layers=((0, 4),)), "layer 4 of the teacher, which has 4; give 0 to 3"),
        (lambda: change(layers=((0, -1),)), "layer -1 of the teacher"),
        (lambda: change(layers=(0, 1)), r"layers=\(0, 1\); give \(student, teacher\) pairs"),
        (lambda: change(layers=((0, 1), (0, 2))), "name a layer of the student twice"),
        (lambda: change(hidden=0.0, layers=((0, 1),)), "layers are given and hidden=0"),
        (lambda: change(relations=1.0, relation_heads=5), "relation_heads=5 does not divide the"),
        (lambda: change(relations=1.0, relation_heads=0), "relation_heads=0 does not divide"),
        (lambda: change(hidden=-1.0), "hidden=-1.0 is not 0 or a number"),
        (lambda: Distillation(TASK, hidden=1.0), "hidden states and relations are not stored"),
        (lambda: Distillation(TASK, teacher), "the teacher's weights are missing"),
        (lambda: Distillation(TASK, student, held, hidden=1.0).objective(teacher),
         "the student has 4 layers, the teacher 2; name the pairs"),
        (lambda: Distillation(Language(), speaks, speaks.init(jax.random.key(0)), hidden=1.0)
         .objective(network), "is 'Recurrent', without the hidden"),
        (lambda: Mixture({"a": dataclasses.replace(own, hidden=0.0, relations=1.0)}).objective(
            student), "is 'OutputsOf', without the hidden"),
        (lambda: own.objective(student)(student.init(jax.random.key(0)), texts()),
         "the weights have no 'distillation'"),
        (lambda: student.collecting("query"), "unknown 'query'; known: hidden queries"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
