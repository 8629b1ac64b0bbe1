"""Batches of a user: what is wrong with one is one line; masks are read under both their names."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.models import (
    Variant,
    compare,
    encoder,
    generate,
    input_moments,
    judge,
    left_pad,
    recurrent,
    resnet,
    seq2seq,
)
from mpjax.ops import rows_alike
from mpjax.optim import wrap
from mpjax.precision import get_precision
from mpjax.tasks import Language, MaskedLanguage, TextClassification, TokenClassification
from mpjax.train.loop import fit
from mpjax.train.step import init_state, make_train_step
from tests.models.shapes import BATCH, drawn, small, stirred

pytestmark = pytest.mark.usefixtures("fast_compile")

TINY: Any = dict(layers=1, width=16, heads=2, vocabulary=32)
IDS = np.arange(12, dtype=np.int32).reshape(2, 6)
MASK = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
LABELS = {"class": np.array([0, 1]), "token": IDS % 3, "masked": IDS, "pretrain": IDS}
LANGUAGE = {"inputs": IDS, "targets": IDS}


def _heads(head: str) -> tuple[Any, Any, dict[str, Any]]:
    more = {"classes": 3} if head in ("class", "token") else {}
    model = encoder("bert-tiny", **TINY, head=head, **more)
    tasks = {
        "class": TextClassification(("a", "b", "c")),
        "token": TokenClassification(("a", "b", "c")),
        "masked": MaskedLanguage(next=0.0),
        "pretrain": MaskedLanguage(),
    }
    batch = {"ids": IDS, "labels": LABELS[head]}
    return model, tasks[head], batch | ({"next": np.array([0, 1])} if head == "pretrain" else {})


@functools.cache
def _families() -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Name -> model, its loss function and a good batch."""
    found: dict[str, tuple[Any, Any, dict[str, Any]]] = {}
    decoder, cells = small(layers=1), recurrent("tiny", layers=1, width=16, vocabulary=32)
    both = seq2seq("seq2seq-tiny", **TINY)
    image = resnet("tiny", widths=(4, 8), inputs=1)
    found["decoder"] = (decoder, decoder.loss, LANGUAGE)
    found["recurrent"] = (cells, cells.loss, LANGUAGE)
    found["seq2seq"] = (both, both.loss, LANGUAGE | {"source": IDS})
    images = {"inputs": np.ones((2, 8, 8, 1), np.float32), "targets": np.array([0, 1])}
    found["resnet"] = (image, image.loss, images)
    for head in LABELS:
        model, task, batch = _heads(head)
        found[head] = (model, task.objective(model), batch)
    return found


NAMES = ("decoder", "recurrent", "seq2seq", "resnet", "class", "pretrain")


@functools.cache
def _shapes(name: str) -> Any:
    return jax.eval_shape(_families()[name][0].init, jax.random.key(0))


def _traced(name: str, batch: Any) -> Any:
    """The loss's shape: what is refused is refused while it is traced, and costs a step nothing."""
    loss = _families()[name][1]
    return jax.eval_shape(lambda p: loss(p, batch)[0], _shapes(name))


def _wrong(name: str, batch: dict[str, Any]) -> dict[str, Any]:
    """What a tired user gives instead."""
    targets = "targets" if "targets" in batch else "labels"
    inputs = "inputs" if "inputs" in batch else "ids"
    empty = {key: x[:0] for key, x in batch.items()}
    odd = {
        "tuple": (batch[inputs], batch[targets]),
        "list": [batch[inputs], batch[targets]],
        "array": batch[inputs],
        "nothing": {},
        "none": None,
        "no targets": {key: x for key, x in batch.items() if key != targets},
        "no inputs": {key: x for key, x in batch.items() if key != inputs},
        "targets of fractions": batch | {targets: batch[targets] + 0.5},
        "targets of another shape": batch | {targets: batch[targets][:1]},
        "text as targets": batch | {targets: "abc"},
        "text as inputs": batch | {inputs: "abc"},
        "a number as inputs": batch | {inputs: 3},
        "empty": empty,
    }
    if name != "resnet":
        odd |= {
            "inputs of fractions": batch | {inputs: batch[inputs] + 0.5},
            "keep and attention_mask": batch
            | {"keep": MASK, "source_keep": MASK, "attention_mask": MASK},
            "a mask to be added": batch | {"attention_mask": -1e9 * (1.0 - MASK)},
            "a mask of another shape": batch | {"attention_mask": MASK[:, :3]},
        }
    return odd


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_is_wrong_is_one_line_while_it_is_traced(name: str) -> None:
    assert _traced(name, _families()[name][2]).shape == ()
    for what, batch in _wrong(name, _families()[name][2]).items():
        with pytest.raises(ConfigError) as caught:
            _traced(name, batch)
        assert len(str(caught.value).splitlines()) == 1, what
        if what in ("tuple", "nothing"):
            assert "give {'" in str(caught.value), "it shows what is expected"


def _program(name: str, names: tuple[str, ...], mask: Any) -> str:
    """The loss's program where the padding is given under these names."""
    _, loss, batch = _families()[name]
    masked = lambda p, m: loss(p, batch | dict.fromkeys(names, m))[0]  # noqa: E731
    return str(jax.make_jaxpr(masked)(_shapes(name), mask))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "resnet"])
def test_an_attention_mask_is_read_in_every_family(name: str) -> None:
    ours, theirs = ("keep",), ("attention_mask",)
    if name == "seq2seq":
        ours, theirs = ("source_keep", "keep"), ("attention_mask", "decoder_attention_mask")
    for mask in (MASK, MASK.astype(bool)):
        assert (
            _program(name, ours, mask) == _program(name, theirs, mask) != _program(name, (), mask)
        )


def _padded(side: str) -> dict[str, Any]:
    ways = {"left": (3, 0), "right": (0, 3)}[side]
    mask = np.pad(np.ones((2, 8), np.int64), ((0, 0), ways))
    rest = {name: np.pad(np.asarray(x), ((0, 0), ways)) for name, x in BATCH.items()}
    return rest | {"attention_mask": mask, "weights": mask.astype(np.float32)}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_behind_an_attention_mask_changes_nothing(side: str) -> None:
    model = small(layers=1)
    plain = judge(model, stirred(model), [BATCH])
    masked = judge(model, stirred(model), [_padded(side)])
    assert masked.tokens == plain.tokens == 16
    assert masked.loss == pytest.approx(plain.loss, rel=1e-5)
    if side == "left":
        got = Language().judge(model)(stirred(model), [_padded(side)])["loss"]
        assert got == pytest.approx(plain.loss, rel=1e-5)
        unseen = {name: x for name, x in _padded(side).items() if name != "attention_mask"}
        assert abs(judge(model, stirred(model), [unseen]).loss - plain.loss) > 1e-3


def _loss(params: Any, batch: Any, *, state: Any, key: Any, train: bool) -> Any:
    return jnp.mean(params["w"] * batch["x"]), state


@functools.cache
def _step(accumulate: int = 1) -> tuple[Any, Any]:
    optimizer = wrap(optax.sgd(0.1), get_precision("fp32"))
    return make_train_step(_loss, optimizer, accumulate=accumulate, count=rows_alike), optimizer


def _state() -> Any:
    return init_state({"w": jnp.zeros(())}, _step()[1])


ROWS = np.ones((4, 2), np.float32)
NO_BATCHES = {
    "number": ({"x": ROWS, "n": 3}, "n of the batch is 3; give arrays"),
    "float": (2.5, "the batch is 2.5"),
    "0-d array": ({"x": ROWS, "n": np.array(1)}, "n of the batch is an array of no axes"),
    "0-d jax array": ({"x": jnp.float32(1)}, "x of the batch is an array of no axes"),
    "NumPy scalar": ({"x": np.float32(1)}, "x of the batch is an array of no axes"),
    "key": ({"x": ROWS, "key": jax.random.key(0)}, "key of the batch is an array of no axes"),
    "text": ({"x": ROWS, "name": "abc"}, "name of the batch is 'abc'"),
    "array of texts": ({"x": ROWS, "name": np.array(["a"] * 4)}, "name of the batch is an array"),
    "array of objects": ({"x": np.array([None] * 4)}, "x of the batch is an array of object"),
    "list of numbers": ({"x": [[1.0, 2.0]]}, "x/0/0 of the batch is 1.0"),
    "empty": ({"x": ROWS[:0]}, "leave an empty batch out"),
}


@pytest.mark.parametrize("case", NO_BATCHES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_takes_arrays_with_rows(case: str, accumulate: int) -> None:
    batch, said = NO_BATCHES[case]
    with pytest.raises(ConfigError, match=said):
        _step(accumulate)[0](_state(), batch)


def test_a_batch_that_is_cut_has_as_many_rows_everywhere() -> None:
    batch = {"x": ROWS, "key": jax.random.PRNGKey(0)}
    with pytest.raises(ConfigError, match="arrays of 2 and 4 rows, and is cut by rows"):
        _step(2)[0](_state(), batch)
    _step(1)[0](_state(), batch)  # not cut: whose rows they are is the loss's business


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([{"x": ROWS}] * 2, "ended before step 3 of 5; give an endless iterator"),
        (iter([]), "ended before step 1 of 5"),
        ({"x": ROWS}, "give an iterator of batches"),
        (7, "batches are 7"),
        ([{"x": 1}] * 5, "x of the batch is 1"),
        ([{"x": ROWS[:0]}] * 5, "leave an empty batch out"),
        ("text!", "the batch is 't'"),
    ],
)
def test_the_loop_says_what_is_wrong_with_its_batches(batches: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fit(_state(), _step()[0], batches, steps=5, report=lambda row: None)


def test_the_loop_takes_a_list_of_as_many_batches() -> None:
    rows: list[Any] = []
    state = fit(_state(), _step()[0], [{"x": ROWS}] * 3, steps=3, report=rows.append)
    assert int(state.step) == len(rows) == 3


@functools.cache
def _judges() -> dict[str, Any]:
    model, masked = small(layers=1), _heads("masked")[0]
    params = stirred(model)
    return {
        "judge": lambda batches: judge(model, params, batches),
        "compare": lambda batches: compare(model, params, batches, [Variant()]),
        "language": lambda batches: Language().judge(model)(params, batches),
        "masked": lambda batches: MaskedLanguage(next=0.0).judge(masked)(drawn(masked), batches),
        "moments": lambda batches: input_moments(model, params, batches),
    }


@pytest.mark.parametrize("who", ["judge", "compare", "language", "masked", "moments"])
@pytest.mark.parametrize(
    "batches",
    [
        {"inputs": IDS, "targets": IDS, "ids": IDS, "labels": IDS},
        [(IDS, IDS)],
        [IDS],
        [5],
        [None],
        "abc",
        [],
        [{"input_ids": IDS, "attention_mask": MASK}],
        [{"inputs": "abc", "targets": IDS, "ids": "abc", "labels": IDS}],
        [{"inputs": IDS[:0], "targets": IDS[:0], "ids": IDS[:0], "labels": IDS[:0]}],
        [{"inputs": 3, "targets": 3, "ids": 3, "labels": 3}],
        iter([]),
    ],
    ids=["dict", "tuples", "arrays", "number", "none", "text", "no batch", "other names",
         "text inside", "empty", "numbers", "no more"],
)  # fmt: skip
def test_what_judges_says_what_is_wrong_with_its_batches(who: str, batches: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        _judges()[who](batches)
    assert len(str(caught.value).splitlines()) == 1


def test_batches_may_come_from_a_generator() -> None:
    model = _heads("masked")[0]
    batch = {"ids": IDS, "labels": np.where(IDS % 2, IDS, -100)}
    judged = MaskedLanguage(next=0.0).judge(model)
    once, again = (judged(drawn(model), b)[0] for b in ([batch], (b for b in [batch])))
    assert once == again


@pytest.mark.parametrize("lengths", [[1.5, 1], [1.0, 2.0], ["1", "2"], [True, True], 2, [[1, 2]]])
def test_lengths_are_integers(lengths: Any) -> None:
    model = small(layers=1)
    with pytest.raises(ConfigError, match="lengths: .*give integers, one for each row"):
        generate(model, stirred(model), IDS[:, :2], new=1, temperature=0.0, lengths=lengths)
    with pytest.raises(ConfigError, match="pads: .*give integers, one for each row"):
        model.init_cache(2, 4, pads=lengths)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([[1.7]], r"prompt: \[1.7\]; give token ids, which are integers"),
        ([[1, 2], [3.0]], "give token ids"),
        ([["a"]], "give token ids"),
        ([[True]], "give token ids"),
        ([[2**40]], "give token ids"),
        ([np.array([2**32 + 5])], "give token ids"),
        ([5, 6], "give a list of prompts"),
        ([[[1], [2]]], "give a list of prompts"),
        ([[1], []], "prompt: empty"),
    ],
)
def test_prompts_are_token_ids(prompts: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        left_pad(prompts)


def test_prompts_may_be_arrays() -> None:
    ids, lengths = left_pad([np.array([3, 4], np.uint16), jnp.array([5]), (6, 7, 8)])
    assert ids.tolist() == [[0, 3, 4], [0, 0, 5], [6, 7, 8]] and lengths.tolist() == [2, 1, 3]


WRONG = [-100, -1, 32]


@functools.cache
def _exact() -> tuple[np.ndarray, np.ndarray]:
    """Losses of BATCH's targets in float64, and whether each is the likeliest."""
    model = small(layers=1)
    scores = np.asarray(model.apply(stirred(model), BATCH["inputs"])[0], np.float64)
    targets = np.asarray(BATCH["targets"])
    picked = np.take_along_axis(scores, targets[..., None], -1)[..., 0]
    return np.log(np.exp(scores).sum(-1)) - picked, scores.argmax(-1) == targets


@pytest.mark.parametrize("wrong", WRONG)
def test_a_target_that_is_no_token_is_refused_unless_it_weighs_nothing(wrong: int) -> None:
    model = small(layers=1)
    params = stirred(model)
    targets = np.array(BATCH["targets"])
    targets[0, :5] = wrong
    weights = np.ones((2, 8), np.float32)
    batch = {"inputs": np.asarray(BATCH["inputs"]), "targets": targets}
    for judged_by in (functools.partial(judge, model), Language().judge(model)):
        with pytest.raises(ConfigError, match=f"decoder: targets hold {wrong}, which is no token"):
            judged_by(params, [batch | {"weights": weights}])
    weights[0, :5] = 0
    judged = judge(model, params, [batch | {"weights": weights}])
    losses, right = _exact()
    chosen = weights > 0
    assert judged.tokens == 11
    assert judged.loss == pytest.approx(losses[chosen].mean(), rel=1e-5)
    assert judged.accuracy == pytest.approx(right[chosen].mean())
    found = Language().judge(model)(params, [batch | {"weights": weights}])
    assert found["loss"] == pytest.approx(losses[chosen].mean(), rel=1e-5)


def test_a_comparison_of_targets_that_are_none_is_refused() -> None:
    model = small(layers=1)
    weights = np.ones((2, 8), np.float32)
    batch = BATCH | {"targets": BATCH["targets"].at[0, 0].set(-100), "weights": weights}
    with pytest.raises(ConfigError, match="targets hold -100.*input_ids and labels"):
        compare(model, stirred(model), itertools.repeat(batch, 1), [Variant(), Variant("int8")])
