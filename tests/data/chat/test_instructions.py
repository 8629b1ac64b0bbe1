"""Instructions: the loss is on the answer, its end included, and nowhere else."""

import pytest

from mpjax.data.buckets import pad
from mpjax.data.chat.instructions import instruction_examples
from mpjax.errors import ConfigError


def encode(text):
    return list(text.encode())


def test_only_answers_have_weight(caplog):
    pairs = [("Q: 1+1?", "2"), ("Q: " + "x" * 50, "no"), ("hi", "hello")]
    examples = instruction_examples(pairs, encode, end=0, longest=16)
    assert len(examples) == 2 and "1 of 3 pairs are longer than 16 tokens" in caplog.text
    for example, (_, answer) in zip(examples, (pairs[0], pairs[2]), strict=True):
        taught = example["targets"][example["weights"] == 1]
        assert bytes(taught.tolist()) == answer.encode() + b"\0"
        assert example["inputs"][1:].tolist() == example["targets"][:-1].tolist()
    batch = pad(examples, 16)
    assert batch["weights"].sum() == 2 + 6 and batch["keep"].sum() == 8 + 7


def test_mistakes_are_one_line():
    with pytest.raises(ConfigError, match="pair 1: empty prompt or answer"):
        instruction_examples([("a", "b"), ("a", "")], encode, end=0, longest=9)
    with pytest.raises(ConfigError, match="none of 1 fits 2 tokens"):
        instruction_examples([("abc", "d")], encode, end=0, longest=2)


def test_what_encodes_gives_integers():
    with pytest.raises(ConfigError, match="encode: gives float64; expected token ids"):
        instruction_examples([("a", "b")], lambda text: [1.5], end=0, longest=8)
