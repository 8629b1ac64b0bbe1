"""Batches as transformers' collators give them train as they are, with the loss of transformers."""

from __future__ import annotations

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.models import encoder, generate, judge, recurrent, seq2seq
from mpjax.models.core.batch_fields import IGNORE, language_batch, seq2seq_batch
from mpjax.ops import Objective
from mpjax.tasks import (
    Adversarial,
    Language,
    MaskedLanguage,
    TextClassification,
    TokenClassification,
)
from mpjax.tasks.adversarial import FGM
from mpjax.train import build
from tests.models.shapes import small, stirred

pytestmark = pytest.mark.usefixtures("fast_compile")

TINY: Any = dict(layers=1, width=16, heads=2, vocabulary=32)
IDS = np.array([[3, 5, 7, 9, 11, 13], [4, 6, 8, 2, 0, 0]])  # int64, as collators give them
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = np.where(MASK == 1, IDS, IGNORE)


def causal_loss(logits: Any, labels: np.ndarray) -> float:
    """transformers' ForCausalLMLoss: labels are moved by one, -100 is no target; in float64."""
    logits, labels = np.asarray(logits, np.float64)[:, :-1], labels[:, 1:]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = labels != IGNORE
    picked = np.take_along_axis(log_p, np.where(chosen, labels, 0)[..., None], -1)[..., 0]
    return float(-picked[chosen].mean())


@functools.cache
def _language(kind: str) -> tuple[Any, Any]:
    if kind == "decoder":
        model: Any = small(layers=1)
        return model, stirred(model)
    model = recurrent("tiny", layers=1, width=16, vocabulary=32)
    return model, jax.tree.map(lambda p: 4 * p, model.init(jax.random.key(3)))


THEIRS = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}


def operations(fn: Any, *args: Any) -> list[str]:
    """The operations of a program, whatever its variables are called."""
    eqns = jax.make_jaxpr(fn)(*args).eqns
    return [f"{e.primitive} {[v.aval for v in e.outvars]}" for e in eqns]


class Encoding(collections.UserDict[str, Any]):
    """A mapping that is no dict and no pytree, as transformers' BatchEncoding."""


class Tensor:
    """What NumPy reads and JAX does not, as a tensor of torch."""

    def __init__(self, x: np.ndarray) -> None:
        self.x, self.ndim, self.shape = x, x.ndim, x.shape

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.x


@pytest.mark.parametrize("kind", ["decoder", "recurrent"])
def test_a_causal_batch_has_the_loss_of_transformers(kind: str) -> None:
    model, params = _language(kind)
    logits = jax.jit(lambda p: model.apply(p, IDS, keep=MASK)[0])(params)
    want = causal_loss(logits, LABELS)
    assert float(jax.jit(model.loss)(params, THEIRS)[0]) == pytest.approx(want, rel=1e-5)
    # Mutants: padding taken for text, labels taken for targets.
    assert abs(causal_loss(logits, IDS) - want) > 1e-3
    assert abs(causal_loss(logits, np.pad(LABELS, ((0, 0), (1, 0)))[:, :-1]) - want) > 1e-3
    assert Language().judge(model)(params, [THEIRS])["loss"] == pytest.approx(want, rel=1e-5)
    if kind == "decoder":
        assert judge(model, params, [THEIRS]).loss == pytest.approx(want, rel=1e-5)
        assert judge(model, params, [THEIRS]).tokens == 8


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_collated_batch_trains_and_microbatches_count_by_their_labels(accumulate: int) -> None:
    model, _ = _language("decoder")
    state, step = build(model, optax.sgd(0.1), accumulate=accumulate)
    logits = jax.jit(lambda p: model.apply(p, IDS, keep=MASK)[0])(state.params)
    want = causal_loss(logits, LABELS)
    tensors = Encoding({name: Tensor(x) for name, x in THEIRS.items()})
    _, metrics = step(state, tensors)  # type: ignore[arg-type]
    assert float(metrics["loss"]) == pytest.approx(want, rel=1e-5)


def test_our_own_names_compile_to_the_same_program() -> None:
    model, params = _language("decoder")
    ours = language_batch(THEIRS, "decoder")
    assert set(ours) == {"inputs", "targets", "weights", "attention_mask"}
    assert language_batch(ours, "decoder") == ours, "once read, it stays"
    got, want = (
        str(jax.make_jaxpr(lambda p, b=batch: model.loss(p, b)[0])(params))
        for batch in (ours, THEIRS)
    )
    assert got == want


def test_what_follows_on_padding_is_no_target() -> None:
    flipped = {name: x[:, ::-1] for name, x in THEIRS.items()}
    weights = language_batch(flipped, "decoder")["weights"]
    assert weights.tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]]


HEADS = {
    "masked": (MaskedLanguage(next=0.0), {"labels": np.where(IDS % 2, IDS, IGNORE)}),
    "class": (TextClassification(("a", "b", "c")), {"labels": np.array([2, 0])}),
    "token": (TokenClassification(("a", "b", "c")), {"labels": np.where(MASK == 1, 1, IGNORE)}),
    "pretrain": (MaskedLanguage(), {"labels": LABELS, "next_sentence_label": np.array([0, 1])}),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_of_an_encoder_is_the_same_under_both_names(head: str) -> None:
    task, more = HEADS[head]
    model = encoder(
        "bert-tiny",
        **TINY,
        head=head,
        **({"classes": 3} if "labels" not in head and head in ("class", "token") else {}),
    )
    types = (IDS > 6).astype(np.int64)
    theirs = {"input_ids": IDS, "token_type_ids": types, "attention_mask": MASK} | more
    ours = {"ids": IDS, "types": types, "keep": MASK} | {
        name.replace("_sentence_label", ""): x for name, x in more.items()
    }
    objective: Objective = task.objective(model)  # type: ignore[attr-defined]
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    got, want, blind = (
        operations(lambda p, b: objective(p, b)[0], shapes, batch)
        for batch in (theirs, ours, {n: x for n, x in theirs.items() if n != "token_type_ids"})
    )
    assert got == want != blind
    assert jax.tree.map(float, objective.count(theirs)) == jax.tree.map(
        float, objective.count(ours)
    )


def test_a_batch_of_an_encoder_decoder_is_the_same_under_both_names() -> None:
    model = seq2seq("seq2seq-tiny", **TINY)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    begun = np.concatenate([np.ones((2, 1), int), IDS[:, :-1]], axis=1)
    theirs = THEIRS | {"decoder_input_ids": begun}
    ours = {"source": IDS, "source_keep": MASK, "inputs": begun, "targets": IDS,
            "weights": MASK.astype(np.float32)}  # fmt: skip
    read = seq2seq_batch(theirs)
    assert set(read) - {"attention_mask"} == set(ours) - {"source_keep"}
    assert (read["weights"] == MASK).all() and (read["targets"] == IDS * MASK).all()
    got, want, blind = (
        operations(lambda p, b=batch: model.loss(p, b)[0], shapes)
        for batch in (theirs, ours, {n: x for n, x in theirs.items() if n != "attention_mask"})
    )
    assert got == want != blind


def test_an_adversary_reads_the_same_batch() -> None:
    model, params = _language("decoder")
    objective = Adversarial(Language(), FGM(epsilon=0.1), special=()).objective(model)
    one, two = (
        str(jax.make_jaxpr(lambda p, b=b: objective(p, b, key=jax.random.key(0))[0])(params))
        for b in (THEIRS, language_batch(THEIRS, "decoder"))
    )
    assert one == two


def _loss(kind: str, batch: Any) -> Any:
    model = {"decoder": _language("decoder")[0], "seq2seq": seq2seq("seq2seq-tiny", **TINY)}[kind]
    return jax.eval_shape(lambda p: model.loss(p, batch)[0],
                          jax.eval_shape(model.init, jax.random.key(0)))  # fmt: skip


REFUSED = {
    "a tuple": ("decoder", (IDS, LABELS), "a batch is a tuple of 2; give {'inputs': ids"),
    "both": ("decoder", THEIRS | {"inputs": IDS}, "holds input_ids and inputs; give inputs and"),
    "mixed": ("decoder", {"inputs": IDS, "labels": IDS}, "holds labels and inputs"),
    "no labels": ("decoder", {"input_ids": IDS}, "holds input_ids and no 'labels'"),
    "positions": ("decoder", THEIRS | {"position_ids": IDS}, "position_ids.*leave it out"),
    "types": ("decoder", THEIRS | {"token_type_ids": IDS}, "token_type_ids.*no token types"),
    "weights": ("decoder", THEIRS | {"weights": MASK * 1.0}, "labels and weights; leave a token"),
    "short labels": ("decoder", THEIRS | {"labels": IDS[:, 1:]}, "labels have shape"),
    "a short mask": ("decoder", THEIRS | {"attention_mask": MASK[:, 1:]}, "attention_mask has"),
    "fractions": ("decoder", THEIRS | {"labels": IDS + 0.5}, "labels are float64"),
    "no start": ("seq2seq", THEIRS, "labels and no decoder_input_ids.*DataCollatorForSeq2Seq"),
    "a source of both": (
        "seq2seq", THEIRS | {"decoder_input_ids": IDS, "source": IDS}, "input_ids and source",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_clear_is_one_line(case: str) -> None:
    kind, batch, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said) as caught:
        _loss(kind, batch)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("wrong", [-1, 32])
def test_an_id_that_is_no_token_is_refused_on_the_host(wrong: int) -> None:
    model, params = _language("decoder")
    ids = np.where(IDS == 9, wrong, IDS)
    state, step = build(model, optax.sgd(0.1))
    said = f"{wrong}, which is no token of the model, whose ids are 0..31"
    for batch in (
        {"inputs": ids, "targets": IDS}, {"inputs": IDS, "targets": ids},
        THEIRS | {"input_ids": ids}, THEIRS | {"labels": ids * MASK},
        {"inputs": jnp.asarray(ids), "targets": jnp.asarray(IDS)},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            step(state, batch)
        with pytest.raises(ConfigError, match=said):
            judge(model, params, [batch])
    with pytest.raises(ConfigError, match=f"{wrong} is no token"):
        generate(model, params, ids, new=1, temperature=0.0)
    step(state, {"inputs": IDS, "targets": IDS})  # the state was not donated by what was refused
    bert = encoder("bert-tiny", **TINY, head="class", classes=3)
    task = TextClassification(("a", "b", "c"))
    with pytest.raises(ConfigError, match=f"encoder: ids hold {said}"):
        task.predictor(bert, batch=2, lengths=[6])(params, [{"input_ids": ids[0]}])
    both = seq2seq("seq2seq-tiny", **TINY)
    with pytest.raises(ConfigError, match=f"decoder: source hold {said}"):
        both.check_batch({"source": ids, "inputs": IDS, "targets": IDS})


def test_a_label_at_padding_is_refused_on_the_host() -> None:
    model, _ = _language("decoder")
    with pytest.raises(ConfigError, match="labels hold tokens where attention_mask is 0"):
        model.check_batch(THEIRS | {"labels": IDS})
