"""Packed batches: each token once an epoch, little padding, the same rows again."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from typing import Any

import numpy as np
import pytest

from mpjax.data import (
    document_examples,
    load_corpus,
    make_tokenizer,
    packed_batches,
)
from mpjax.data.chat import instruction_examples
from mpjax.data.masking import masking
from mpjax.data.packing import packed_batches as module
from mpjax.data.tokenizers.wordpiece import train_wordpiece
from mpjax.errors import ConfigError

DRAW = np.random.default_rng(0)
BYTES = make_tokenizer("bytes", [])
# Each token is a number of its own, so that a row says whose tokens it holds.
BOUNDS = np.cumsum([0, *DRAW.integers(1, 20, 90)])
EXAMPLES: Any = [
    {"inputs": np.arange(a, b, dtype=np.uint16), "targets": np.arange(a, b, dtype=np.uint16) + 1}
    for a, b in itertools.pairwise(BOUNDS)
]


def packed(examples: Any = EXAMPLES, **changes: Any) -> Any:
    return packed_batches(examples, **dict(batch=4, length=20, seed=3) | changes)


def documents_of(batch: Any, name: str = "inputs") -> list[list[int]]:
    """The documents of a batch, as its segments tell them apart."""
    found = []
    for row, segments in zip(batch[name], batch["segments"], strict=True):
        assert segments.tolist() == sorted(segments.tolist(), key=lambda n: n or 99)  # 1 2 ... 0
        found += [row[segments == n].tolist() for n in range(1, segments.max() + 1)]
    return found


@pytest.mark.parametrize("windows", [1, 3])
def test_an_epoch_is_every_document_once(windows: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "WINDOW", 90 // windows)
    for number in range(2):
        found = list(packed().epoch(number))
        whole = [one for batch in found for one in documents_of(batch)]
        assert sorted(whole) == [one["inputs"].tolist() for one in EXAMPLES]
        for batch in found:
            real = batch["segments"] > 0
            assert {x.dtype.name for x in batch.values()} == {"int32", "float32"}
            assert np.array_equal(batch["weights"], real)
            assert np.array_equal(batch["targets"], np.where(real, batch["inputs"] + 1, 0))
        rows = np.concatenate([batch["segments"] for batch in found])
        taken = rows[(rows > 0).any(1)]
        assert len(rows) - len(taken) < 4  # empty ones, behind the last
        assert packed().padding(number) == pytest.approx(np.mean(taken == 0))


def test_the_endless_batches_are_epoch_after_epoch() -> None:
    rows = [row for number in range(3) for batch in packed().epoch(number)
            for row in batch["inputs"][(batch["segments"] > 0).any(1)].tolist()]  # fmt: skip
    taken = [row for batch in itertools.islice(packed(), len(rows) // 4)
             for row in batch["inputs"].tolist()]  # fmt: skip
    assert taken == rows[: len(taken)]
    assert len(set(map(str, rows))) > len(rows) / 3 + 1  # epochs pack anew


def test_rows_follow_the_seed() -> None:
    one, again, other = (next(packed(seed=seed))["inputs"] for seed in (3, 3, 4))
    assert np.array_equal(one, again) and not np.array_equal(one, other)


def test_a_saved_position_goes_on_with_the_same_bits(monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "WINDOW", 30)
    noise = lambda batch, draw: batch | {"noise": draw.random(len(batch["inputs"]))}  # noqa: E731
    whole, seen = packed(change=noise), []
    for _ in range(40):  # over the end of epochs
        state = whole.get_state()
        seen.append((state, next(whole)))
    assert {state["epoch"] for state, _ in seen} >= {0, 1}
    assert {state["window"] for state, _ in seen} == {0, 1, 2}
    for place, (state, _) in enumerate(seen[:38]):
        resumed = packed(change=noise)
        resumed.set_state(state)
        for _, want in seen[place : place + 2]:
            got = next(resumed)
            assert all(got[name].tobytes() == want[name].tobytes() for name in want)
    assert len({batch["noise"].tobytes() for _, batch in seen}) == 40


def test_processes_take_their_rows_of_one_batch() -> None:
    noise = lambda batch, draw: batch | {"noise": draw.random(len(batch["inputs"]))}  # noqa: E731
    whole = packed(change=noise)
    parts = [packed(change=noise, process_index=i, process_count=2) for i in range(2)]
    for _ in range(3):
        want, got = next(whole), [next(part) for part in parts]
        for name in want:
            assert np.array_equal(want[name], np.concatenate([one[name] for one in got]))


def test_a_longer_document_is_taken_apart_and_counted(caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        batches = list(packed(length=8, longer="split").epoch())
    assert "of 90 examples are longer than 8 tokens; split, which makes" in caplog.text
    tokens = Counter(t for batch in batches for one in documents_of(batch) for t in one)
    assert tokens == Counter(range(int(BOUNDS[-1])))
    with pytest.raises(ConfigError, match="are longer than length=8; raise it, leave them out, or"):
        packed(length=8)


@pytest.mark.parametrize("prefix", [(), (7,), (0,)])
def test_each_token_of_a_document_is_a_target_once(prefix: tuple[int, ...]) -> None:
    """BOS is no target; a separator as BOS is read like one."""

    class Own:
        separator = 0

    Own.prefix = prefix  # type: ignore[attr-defined]
    texts = [[3, 4, 5], [6], [8, 9]]
    stream = np.array([t for text in texts for t in [*prefix, *text, 0]], np.uint8)
    found = document_examples(stream, Own)  # type: ignore[arg-type]
    assert [one["targets"].tolist() for one in found] == [[*text, 0] for text in texts]
    assert [one["inputs"].tolist() for one in found] == [[*(prefix or (0,)), *t] for t in texts]
    assert found[1]["inputs"].base is not None  # a part of the stream, not a copy
    cut = document_examples(stream[:-1], Own)  # type: ignore[arg-type]
    assert cut[-1]["targets"].tolist() == [8, 9]


def test_documents_without_a_token_are_left_out() -> None:
    stream = np.array([0, 5, 0, 0, 6, 0])
    assert [x["targets"].tolist() for x in document_examples(stream, BYTES)] == [[5, 0], [6, 0]]
    for bad in (np.zeros(3, np.int32), np.zeros(0, np.int32), np.ones(3), [[1, 0]], "abc"):
        with pytest.raises(ConfigError, match="^tokens: "):
            document_examples(bad, BYTES)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="tokenizer: 'bytes'; give the one that made the ids"):
        document_examples(stream, "bytes")  # type: ignore[arg-type]


def test_padding_of_the_standard_library_is_small(record_property: Any, tmp_path: Any) -> None:
    """At most 2 %; a document a row, or documents in turn, leave more."""
    corpus = load_corpus("stdlib", cache_dir=tmp_path)
    found = document_examples(corpus.train, corpus.tokenizer)
    assert len(found) == corpus.info["train_documents"]
    assert sum(len(one["targets"]) for one in found) == corpus.info["train_tokens"]
    sizes = np.array([len(one["targets"]) for one in found])
    for length in (512, 2048, 8192):
        share = packed(found, length=length, longer="split").padding()
        alone = 1 - sizes.sum() / (-(-sizes // length) * length).sum()
        record_property(f"padding of {length}", f"{share:.2%}, a piece a row {alone:.2%}")
        print(f"stdlib, rows of {length} bytes: padding {share:.2%}, a piece a row {alone:.2%}")
        assert share < 0.02 and share < alone
    whole = [one for one in found if len(one["targets"]) <= 8192]  # none is taken apart
    share = packed(whole, length=8192).padding()
    in_turn, room = 0, 0
    for one in whole:
        if len(one["targets"]) > room:
            in_turn, room = in_turn + 1, 8192
        room -= len(one["targets"])
    total = sum(len(one["targets"]) for one in whole)
    print(f"whole documents of at most 8192: {share:.2%}, in turn {1 - total / in_turn / 8192:.2%}")
    assert share < 0.02 < 1 - total / in_turn / 8192


def test_answers_keep_their_weights() -> None:
    pairs = [("2+2=", "4"), ("say hi: ", "hi"), ("a", "bcdef")]
    examples = instruction_examples(pairs, lambda t: list(t.encode()), end=0, longest=24)
    batch = next(packed(examples, batch=2, length=24).epoch())
    assert "keep" not in batch and batch["weights"].sum() == sum(len(b) + 1 for _, b in pairs)
    for row, weights, segments in zip(*(batch[n] for n in ("targets", "weights", "segments")),
                                      strict=True):  # fmt: skip
        for number in range(1, segments.max() + 1):
            answer = row[(segments == number) & (weights > 0)]
            assert bytes(answer[:-1].tolist()).decode() in [b for _, b in pairs]
            assert answer[-1] == 0


def test_tokens_of_packed_texts_are_masked() -> None:
    texts = ["one two three", "four five", "six seven eight nine ten"] * 4
    pieces = train_wordpiece(texts, 60)
    examples = pieces.encode(texts, longest=16)
    batch = next(packed(examples, batch=8, length=16, change=masking(pieces, 0.5)))
    real, hidden = batch["segments"] > 0, batch["labels"] != -100
    assert hidden.any() and not (hidden & ~real).any() and "keep" not in batch
    assert not (hidden & np.isin(batch["ids"], [pieces.first, pieces.separator])).any()


ONE = {"inputs": np.arange(3), "targets": np.arange(3)}
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "nothing": ([], {}, "examples: none"),
    "no dict": ([5], {}, r"examples\[0\] is 5; give a dict"),
    "a number": ([ONE | {"label": 1}], {}, "'label' is one number an example, and a row holds sev"),
    "two lengths": (
        [ONE | {"targets": np.arange(2)}],
        {},
        r"examples\[0\]: .*'targets': 2.* tokens",
    ),
    "no token": ([ONE, {"inputs": [], "targets": []}], {}, r"examples\[1\] has no token; leave it"),
    "padding": ([ONE | {"keep": np.array([1, 1, 0])}], {}, r"examples\[0\]: keep hides tokens"),
    "a mask": ([ONE | {"attention_mask": [0, 1, 1]}], {}, "attention_mask hides tokens"),
    "segments": ([ONE | {"segments": np.ones(3)}], {}, "have 'segments', which packing adds"),
    "text": ([{"inputs": "abc"}], {}, "inputs is 'abc'; give a number, or one a token"),
    "length": ([ONE], {"length": 0}, "packing: length=0; give a whole number from 1"),
    "a fraction": ([ONE], {"length": 8.0}, "packing: length=8.0; give a whole number from 1"),
    "batch": ([ONE], {"batch": 0}, "packing: batch=0; give a whole number from 1"),
    "a stream": (
        np.arange(9),
        {},
        "examples are an array of int64, .* give a list of dicts, of a st",
    ),
    "seed": ([ONE], {"seed": -1}, "packing: seed=-1; give a whole number from 0"),
    "longer": ([ONE], {"longer": "cut"}, "packing: longer='cut'; known: error split"),
    "processes": ([ONE], {"process_count": 3}, "does not divide by process_count=3"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_packed_is_one_line(what: str) -> None:
    examples, changes, said = WRONG[what]
    with pytest.raises(ConfigError, match=said) as caught:
        packed(examples, **changes)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "state",
    [
        {"next_index": 4},
        {"epoch": 0, "window": 0, "row": 999},
        {"epoch": 0, "window": 7, "row": 0},
        {"epoch": -1, "window": 0, "row": 0},
        {"epoch": 0.0, "window": 0, "row": 0},
        {},
        None,
        5,
    ],
)
def test_a_position_of_something_else_is_one_line(state: Any) -> None:
    iterator = packed()
    with pytest.raises(ConfigError, match="packing: the position .* is none of these batches"):
        iterator.set_state(state)
    assert next(iterator)["inputs"].tobytes() == next(packed())["inputs"].tobytes()
