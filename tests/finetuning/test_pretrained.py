"""Checkpoints with the head of a task: kept where it fits, drawn anew where it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mpjax.data import train_wordpiece
from mpjax.errors import ConfigError
from mpjax.finetuning import finetune, from_pretrained
from mpjax.models import decoder, encoder
from mpjax.models.hf import Metadata, load_checkpoint, save_checkpoint
from tests.finetuning.test_finetune import SMALL, reviews

pytestmark = pytest.mark.usefixtures("fast_compile")
SIZES: dict[str, Any] = dict(layers=1, width=16, heads=2)


def saved(folder: Path, head: str, **changes: Any) -> tuple[Path, Any]:
    """A checkpoint of an encoder with a tokenizer, and its weights."""
    pieces = train_wordpiece([row["review"] for row in reviews()], 90)
    model = encoder(
        "bert-tiny", vocabulary=pieces.vocab_size, context=32, head=head, **SIZES, **changes
    )
    params = model.init(jax.random.key(3))
    files = Metadata(files={"tokenizer.json": pieces.to_text()})
    save_checkpoint(folder, model, params, metadata=files)
    return folder, params


@pytest.mark.parametrize(
    ("held", "task", "labels", "kept"),
    [
        ({"head": "none"}, "classify", ("a", "b"), False),
        ({"head": "masked"}, "tag", ("N", "V"), False),
        ({"head": "pretrain", "classes": 2}, "pair", ("a", "b"), False),
        ({"head": "class", "classes": 2, "labels": ("b", "a")}, "classify", ("a", "b"), True),
        ({"head": "class", "classes": 2, "labels": ("x", "y")}, "classify", ("a", "b"), False),
        ({"head": "class", "classes": 3, "labels": ("a", "b", "c")}, "pair", ("a", "b"), False),
        ({"head": "token", "classes": 2, "labels": ("V", "N")}, "tag", ("N", "V"), True),
        ({"head": "token", "classes": 2, "labels": ("V", "N")}, "classify", ("a", "b"), False),
        ({"head": "class", "classes": 1}, "regress", (), True),
        ({"head": "class", "classes": 2}, "regress", (), False),
    ],
)
def test_a_head_is_kept_for_the_same_labels_alone(
    held: dict[str, Any], task: str, labels: tuple[str, ...], kept: bool, tmp_path: Path
) -> None:
    folder, theirs = saved(tmp_path / "bert", **held)
    model, params, tokenizer = from_pretrained(folder, "fp32", task=task, labels=labels, seed=1)
    head = "token" if task == "tag" else "class"
    assert model.config.head == head and tokenizer is not None
    assert model.config.classes == (1 if task == "regress" else 2)
    same = {"layers", "embed", "norm_embed", *([head] if kept else [])}
    for name in same & set(theirs["encoder"]):
        for a, b in zip(
            *(jax.tree.leaves(p["encoder"][name]) for p in (params, theirs)), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    if kept:
        assert model.config.labels == held.get("labels", model.config.labels)
    elif labels:
        assert model.config.labels == labels
        _, again, _ = from_pretrained(folder, "fp32", task=task, labels=labels, seed=2)
        kernels = [
            np.asarray(next(x for x in jax.tree.leaves(p["encoder"][head]) if x.ndim > 1))
            for p in (params, again)
        ]
        assert (kernels[0] != kernels[1]).any()


def test_a_run_begins_with_a_checkpoint_and_keeps_its_order_of_labels(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "bert", "class", classes=2, labels=("1", "0"))
    run = finetune(
        reviews(), text="review", label="stars", model=str(folder), steps=20, lr=1e-2,
        out=tmp_path / "run", **SMALL,
    )  # fmt: skip
    assert run.task.classes == ("1", "0") == run.model.config.labels
    answers = run.predict([row["review"] for row in reviews()])
    right = sum(int(a["label"]) == row["stars"] for a, row in zip(answers, reviews(), strict=True))
    assert right > 0.8 * len(answers)  # in the other order as many would be wrong
    path = run.export(tmp_path / "out")
    assert from_pretrained(path, task="classify", labels=("0", "1")).model.config.labels == (
        "1",
        "0",
    )
    # without its head, for sentence-transformers: the mean of what the run makes of the tokens
    vectors = run.export(tmp_path / "vectors", vectors=True)
    assert "Pooling" in (vectors / "modules.json").read_text()
    body, params = load_checkpoint(vectors, head="none", pool="mean")
    ids = np.array([[2, 7, 9, 3, 0], [2, 8, 3, 0, 0]], np.int32)
    keep = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], bool)
    found = body.apply(params, {"ids": ids, "keep": keep})[0]["pooled"]
    features = run.model.apply(run.params, {"ids": ids, "keep": keep})[0]["features"]
    weights = keep / keep.sum(1, keepdims=True)
    mean = np.einsum("btd,bt->bd", np.asarray(features, np.float64), weights)
    np.testing.assert_allclose(found, mean, atol=1e-6)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("lm", "takes a decoder"),
        ("instruct", "takes a decoder"),
        ("translate", "unknown 'translate'"),
    ],
)
def test_models_of_another_family_are_one_line(task: str, said: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "bert", "none")
    with pytest.raises(ConfigError, match=said):
        from_pretrained(folder, task=task)


def test_a_decoder_is_no_classifier(tmp_path: Path) -> None:
    llama = decoder("tiny", **SIZES)
    save_checkpoint(tmp_path / "llama", llama, llama.init(jax.random.key(0)))
    with pytest.raises(ConfigError, match="takes an encoder .BERT.; its model_type is 'llama'"):
        from_pretrained(tmp_path / "llama", task="classify", labels=("a", "b"))
    found = from_pretrained(tmp_path / "llama", "bf16", task="lm")
    assert found.tokenizer is None and found.model.config.width == 16
