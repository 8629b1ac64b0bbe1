"""Packed documents: none changes another, in logits and gradients, bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.data import packed_batches
from mpjax.data.buckets import pad
from mpjax.errors import ConfigError
from mpjax.models import encoder, judge, recurrent, seq2seq
from mpjax.ops import attention
from mpjax.precision import get_precision, parse_policy
from mpjax.tasks import (
    Adversarial,
    Distillation,
    Language,
    MaskedLanguage,
    TextClassification,
    TokenClassification,
)
from mpjax.tasks.adversarial import FGM
from mpjax.train import build, parse_mesh
from tests.models.shapes import FAST, drawn, small

pytestmark = pytest.mark.usefixtures("fast_compile")

FIRST, SECOND, T = slice(0, 5), slice(5, 11), 12  # the documents of a row, then padding
SEGMENTS = np.array([[1] * 5 + [2] * 6 + [0]])
ALONE = np.array([[0] * 5 + [1] * 6 + [0]])
ONE = np.ones((1, T), np.int32)  # control: the row is one document
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 32, (1, T))
OTHER = np.where(np.arange(T) < 5, RNG.integers(1, 32, (1, T)), IDS)  # of another first document
ENCODER: Any = dict(layers=1, width=16, heads=2, vocabulary=32, context=16, head="masked")
MODELS: dict[str, Any] = {
    "learned": lambda precision: small(precision, "gpt", layers=1),
    "rotary, grouped": lambda precision: small(precision, "llama"),
    "rotary, window": lambda precision: small(
        precision, "llama", window=3, loop="scan", remat="full"
    ),
    "encoder": lambda precision: encoder("bert-tiny", precision, **ENCODER),
}


def _model(name: str, precision: str = "fp32") -> Any:
    return MODELS[name](get_precision(precision))


def _logits(model: Any, params: Any, ids: Any, segments: Any) -> Any:
    if model.root == "encoder":
        return model.apply(params, {"ids": ids, "segments": segments})[0]["masked"]
    return model.apply(params, ids, segments=segments)[0]


@functools.cache
def _program(name: str, precision: str) -> Any:
    """Logits, and the gradient of the loss of the second document, of a row."""
    model = _model(name, precision)

    def loss(params: Any, ids: Any, segments: Any) -> Any:
        logits = _logits(model, params, ids, segments)
        each = -jax.nn.log_softmax(logits.astype(jnp.float32))[..., 7]
        return jnp.sum(each[:, SECOND]), logits

    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)
    return lambda ids, segments: run(drawn(model), ids, segments)


def _second(found: Any) -> bytes:
    return np.asarray(found[1][:, SECOND]).tobytes()


def _bits(grads: Any) -> list[bytes]:
    """The bits of gradients but for the sign of zero, which a product with zero has."""
    return [(np.asarray(x) + np.zeros((), x.dtype)).tobytes() for x in jax.tree.leaves(grads)]


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "fp32") for name in MODELS), ("rotary, grouped", "bf16"), ("learned", "fp16")],
)
def test_a_document_does_not_depend_on_another(name: str, precision: str) -> None:
    run = _program(name, precision)
    both, other, alone = run(IDS, SEGMENTS), run(OTHER, SEGMENTS), run(IDS, ALONE)
    assert np.any(np.asarray(both[1][:, FIRST] != other[1][:, FIRST]))
    assert _second(both) == _second(other) == _second(alone)
    assert _bits(both[0]) == _bits(other[0]) == _bits(alone[0])
    leaky = run(IDS, ONE), run(OTHER, ONE)  # control: in one document it does
    assert _second(leaky[0]) != _second(leaky[1])
    assert _bits(leaky[0][0]) != _bits(leaky[1][0])


@pytest.mark.parametrize(("recipe", "same"), [("fp8-row", True), ("fp8", False)])
def test_a_scale_of_the_whole_tensor_is_shared_by_documents(recipe: str, same: bool) -> None:
    model = small(recipe, layers=1)
    run = jax.jit(lambda ids: model.apply(drawn(model), ids, segments=SEGMENTS)[0])
    both, other = (np.asarray(run(ids))[:, SECOND].tobytes() for ids in (IDS, OTHER))
    assert (both == other) is same


@pytest.mark.parametrize("name", MODELS)
def test_positions_begin_at_0_in_each_document(name: str) -> None:
    run = _program(name, "fp32")
    shifted = np.concatenate([IDS[:, SECOND], IDS[:, FIRST], IDS[:, 11:]], 1)
    found = run(shifted, np.array([[1] * 6 + [2] * 5 + [0]]))[1]
    # float32 sums of 12 terms in another order
    np.testing.assert_allclose(found[:, :6], run(IDS, SEGMENTS)[1][:, SECOND], atol=2e-5)
    np.testing.assert_allclose(found[:, 6:11], run(IDS, SEGMENTS)[1][:, FIRST], atol=2e-5)
    if name == "learned":  # control: the place in the row would be seen
        assert np.abs(found[:, 6:11] - run(shifted, ONE)[1][:, 6:11]).max() > 1e-2


def test_a_number_that_comes_again_is_another_document() -> None:
    run = _program("rotary, grouped", "fp32")
    again = np.array([[2] * 3 + [1] * 2 + [2] * 6 + [1]])
    assert _second(run(IDS, again)) == _second(run(IDS, SEGMENTS))


@functools.cache
def _documents() -> list[dict[str, np.ndarray]]:
    ids = [RNG.integers(1, 32, n + 1).astype(np.int32) for n in (5, 6, 9, 2, 12, 3, 4)]
    return [{"inputs": one[:-1], "targets": one[1:]} for one in ids]


def _packed() -> dict[str, Any]:
    return jax.tree.map(jnp.asarray, next(_epoch(_documents())))


def _epoch(examples: Any) -> Any:
    return packed_batches(examples, batch=4, length=T, seed=0).epoch()


def _padded() -> dict[str, Any]:
    """The documents unpacked, each in a row of its own."""
    keep = [{"keep": np.ones(len(one["inputs"]), bool)} for one in _documents()]
    batch = pad([one | two for one, two in zip(_documents(), keep, strict=True)], T)
    return jax.tree.map(jnp.asarray, batch | {"weights": batch["keep"].astype(np.float32)})


@pytest.mark.parametrize("name", ["learned", "rotary, grouped"])
def test_the_loss_is_that_of_the_documents_unpacked(name: str) -> None:
    """In float64, where two orders of a sum are 1e-15 apart."""
    model = _model(name)
    with jax.enable_x64(True):
        own = get_precision("fp32", rules=["**=p=f64,c=f64,o=f64"])
        model = dataclasses.replace(model, precision=own)
        params = drawn(model)
        loss = jax.jit(lambda batch: model.loss(params, batch)[0], compiler_options=FAST)
        packed, padded = (
            {key: x if x.dtype == bool else x.astype(np.int64) for key, x in batch.items()}
            for batch in (_packed(), _padded())
        )
        assert packed["weights"].sum() == padded["weights"].sum() == 41
        assert float(loss(packed)) == pytest.approx(float(loss(padded)), rel=1e-13)
        windows = packed | {"segments": jnp.ones_like(packed["segments"])}  # control
        assert float(loss(windows)) != pytest.approx(float(loss(padded)), rel=1e-4)


def test_what_judges_reads_segments() -> None:
    model = small(layers=1)
    want, got = (judge(model, drawn(model), [batch]) for batch in (_padded(), _packed()))
    assert got.tokens == want.tokens == 41
    assert got.loss == pytest.approx(want.loss, rel=1e-5)
    found = Language().judge(model)(drawn(model), [_packed()])
    assert found["loss"] == pytest.approx(want.loss, rel=1e-5)


@functools.cache
def _stepped(accumulate: int, mesh: str) -> Any:
    """Weights and loss after a step of SGD on packed rows."""
    devices = parse_mesh(mesh) if mesh else None
    state, step = build(small(layers=1), optax.sgd(0.1), devices, accumulate=accumulate, seed=3)
    state, metrics = step(state, step.place(_packed()) if mesh else _packed())
    return jax.device_get(state.params), float(metrics["loss"])


@pytest.mark.parametrize(("accumulate", "mesh"), [(2, ""), (1, "data=2,fsdp=2,tensor=2")])
def test_a_step_is_the_same_cut_and_on_a_mesh(accumulate: int, mesh: str) -> None:
    batch = _packed()
    assert len(set(np.sum(batch["weights"].reshape(2, -1), 1).tolist())) == 2  # unlike halves
    (params, loss), (want, once) = _stepped(accumulate, mesh), _stepped(1, "")
    assert loss == pytest.approx(once, rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), params, want)


@pytest.mark.parametrize("kind", ["masked", "token"])
def test_an_encoder_learns_from_packed_texts(kind: str) -> None:
    """The objective of packed texts is that of the same texts, padded."""
    more = {"head": kind} | ({"classes": 3} if kind == "token" else {})
    model = encoder("bert-tiny", **(ENCODER | more))
    task: Any = (
        MaskedLanguage(next=0.0) if kind == "masked" else TokenClassification(("a", "b", "c"))
    )
    texts = [
        {"ids": one["inputs"], "labels": np.where(one["targets"] % 2, one["targets"] % 3, -100)}
        for one in _documents()
    ]
    loss = jax.jit(task.objective(model), compiler_options=FAST)
    packed, padded = next(_epoch(texts)), pad(texts, T) | {"keep": _padded()["keep"]}
    want = float(loss(drawn(model), padded)[0])
    assert float(loss(drawn(model), packed)[0]) == pytest.approx(want, rel=1e-5)
    unseen = packed | {"segments": np.ones_like(packed["segments"])}
    assert abs(float(loss(drawn(model), unseen)[0]) - want) > 1e-3


def test_a_teacher_reads_segments() -> None:
    model, student = small(layers=1), small(layers=1, width=8)
    inside = Distillation(Language(), model, drawn(model), hard=0.0, hidden=1.0)
    params = drawn(student) | inside.objective(student).init(jax.random.key(0))
    loss = jax.jit(inside.objective(student), compiler_options=FAST)
    want, got = (float(loss(params, batch)[0]) for batch in (_padded(), _packed()))
    assert got == pytest.approx(want, rel=1e-5)
    related = Distillation(Language(), model, drawn(model), relations=1.0, relation_heads=4)
    with pytest.raises(ConfigError, match="relations are between the tokens of a row, and segm"):
        jax.eval_shape(related.objective(student), params, _packed())


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 5), (False, 5)])
def test_attention_of_documents_in_float64(causal: bool, window: int) -> None:
    """Of 128 tokens, which causal attention takes in blocks; three heads share a key."""
    segments = np.repeat([[7, 3, 4, 1]], [40, 1, 59, 28], axis=1)
    q, k, v = (RNG.normal(size=(1, 128, h, 4)) for h in (6, 2, 2))
    apart = np.subtract.outer(np.arange(128), np.arange(128))
    sees = (segments.T == segments) & (apart >= 0 if causal else True)
    sees &= (np.abs(apart) < window) if window else True
    scores = np.einsum("bthk,bshk->bhts", q, np.repeat(k, 3, 2)) / 2
    weights = np.where(sees, np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("bhts,bshk->bthk", weights, np.repeat(v, 3, 2))

    @functools.partial(jax.jit, compiler_options=FAST)
    def run(q: Any, k: Any, v: Any, segments: Any) -> Any:
        f32 = parse_policy("f32")
        return attention(q, k, v, f32, f32, causal=causal, window=window, segments_BT=segments)

    three = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    np.testing.assert_allclose(run(*three, segments), want, atol=2e-6)
    assert np.abs(run(*three, segments // 10) - want).max() > 0.1  # control: one document


def test_without_segments_a_program_has_none_of_it() -> None:
    model = small()
    batch = {"inputs": IDS, "targets": IDS, "weights": jnp.ones(IDS.shape)}
    text = lambda batch: str(jax.make_jaxpr(lambda p: model.loss(p, batch)[0])(drawn(model)))  # noqa: E731
    assert "cummax" in text(batch | {"segments": SEGMENTS}) and "cummax" not in text(batch)


def _cached(segments: Any) -> Any:
    model = small()
    return model.apply(drawn(model), IDS, segments=segments, state=model.init_cache(1, T))


def _loss(**changes: Any) -> Any:
    model = small()
    batch = {
        "inputs": IDS,
        "targets": IDS,
        "segments": SEGMENTS,
        "weights": jnp.asarray(SEGMENTS > 0),
    }
    batch = {key: x for key, x in (batch | changes).items() if x is not None}
    return model.loss(drawn(model), batch)


def _encoded(model: Any = None, **changes: Any) -> Any:
    model = model or _model("encoder")
    return model.apply(drawn(model), {"ids": IDS, "segments": SEGMENTS} | changes)


def _pair() -> Any:
    model = seq2seq("seq2seq-tiny", layers=1, width=16, heads=2, vocabulary=32)
    batch = {"source": IDS, "inputs": IDS, "targets": IDS, "segments": SEGMENTS}
    return model.loss(jax.eval_shape(model.init, jax.random.key(0)), batch)


def _recurrent() -> Any:
    model = recurrent("tiny", width=16, vocabulary=32)
    return model.apply(drawn(model), IDS, segments=SEGMENTS)


def _adversarial() -> Any:
    loss = Adversarial(Language(), FGM(), special=()).objective(small())
    return loss(drawn(small()), _packed(), key=jax.random.key(0), train=True)


CLASSES: Any = dict(layers=1, width=16, heads=2, vocabulary=32, head="class")
REFUSED: dict[str, tuple[Any, str]] = {
    "fractions": (lambda: _loss(segments=1.0 * SEGMENTS), "decoder: segments are float32"),
    "bool": (lambda: _loss(segments=SEGMENTS > 1), "segments are bool of shape"),
    "negative": (lambda: _loss(segments=SEGMENTS - 1), "segments hold -1; number documents 1, 2"),
    "another shape": (lambda: _loss(segments=ONE[:, :3]), r"of shape \(1, 3\); give .*\(1, 12\)"),
    "text": (lambda: _loss(segments="1 2"), "decoder: segments is '1 2'; give an array"),
    "keep too": (lambda: _loss(keep=ONE), "segments and keep are given; segments are 0 at"),
    "a mask too": (lambda: _loss(attention_mask=SEGMENTS), "segments and keep are given"),
    "no weights": (lambda: _loss(weights=None), "holds segments and no weights; add them, 0 at"),
    "a cache": (lambda: _cached(SEGMENTS), "segments are given beside a cache"),
    "cells": (_recurrent, "recurrent: segments are given, and its state goes"),
    "two texts": (_pair, "seq2seq: segments are given, and a target has one source"),
    "offsets": (_adversarial, "adversarial: an offset is as large as epsilon in each row"),
    "an encoder's fractions": (lambda: _encoded(segments=0.5 * ONE), "encoder: segments are fl"),
    "an encoder's keep": (lambda: _encoded(keep=ONE), "encoder: segments and keep are given"),
    "an encoder's shape": (lambda: _encoded(segments=ONE[:, :3]), r"encoder: segments has shape"),
    "a text's class": (
        lambda: _encoded(encoder("bert-tiny", **CLASSES)), "head='class' pools a row as one text"
    ),
    "its task": (
        lambda: TextClassification(("a", "b")).objective(encoder("bert-tiny", **CLASSES))(
            drawn(encoder("bert-tiny", **CLASSES)),
            {"ids": IDS, "segments": SEGMENTS, "labels": np.array([0])},
        ),
        "head='class' pools a row as one text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_segments_that_cannot_be_used_are_one_line(what: str) -> None:
    run, said = REFUSED[what]
    with pytest.raises(ConfigError, match=said) as caught:
        run()
    assert len(str(caught.value).splitlines()) == 1


def test_the_kernel_and_a_cache_refuse_segments() -> None:
    x, f32 = jnp.ones((1, 4, 1, 8)), parse_policy("f32")
    segments = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ConfigError, match="padding, window or segments; here: .*cache, pad"):
        attention(x, x, x, f32, f32, segments_BT=segments, kernel="cudnn")
    with pytest.raises(ConfigError, match=r"segments have shape \(1, 2\), .* keys \(1, 4\)"):
        attention(x[:, :2], x, x, f32, f32, segments_BT=segments[:, :2])
    with pytest.raises(ConfigError, match="and no cache"):
        attention(x, x, x, f32, f32, segments_BT=segments, first=jnp.int32(0))
