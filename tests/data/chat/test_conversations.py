"""Conversations: the loss is on each answer once, its end included, read as chat asks for it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tokenizers

from mpjax.data.chat import Chat, conversation_examples
from mpjax.errors import ConfigError
from tests.models.hf import text_cases

pytest.importorskip("jinja2", reason="the extra chat is not installed")

TALK = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hé?"},
    {"role": "assistant", "content": "<think>hm</think>\nyes"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no</s> more"},  # spells an end
]
# As published templates write their turns.
TEMPLATES = {
    "ChatML": (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    ),
    "Llama 2": (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
        "{% else %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
    ),
    "earlier thoughts are left out": (
        "{% for m in messages %}{{ m.role }}:"
        "{% if loop.last or m.role != 'assistant' %}{{ m.content }}"
        "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    ),
}


def chat_of(template: str) -> Chat:
    backend = text_cases.tokenizer(None)
    return Chat(backend.to_str(), template, "</s>", {"bos_token": "<s>"})


def taught(example: dict[str, np.ndarray]) -> list[list[int]]:
    """The targets with weight, run by run."""
    pairs = zip(example["weights"], example["targets"].tolist(), strict=True)
    runs = itertools.groupby(pairs, key=lambda pair: pair[0])
    return [[target for _, target in run] for weight, run in runs if weight]


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_is_taught_once_and_read_as_chat_asks_for_it(name: str) -> None:
    chat, backend = chat_of(TEMPLATES[name]), text_cases.tokenizer(None)
    examples = conversation_examples([TALK], chat, longest=500)
    found = [backend.decode(ids, skip_special_tokens=False) for e in examples for ids in taught(e)]
    space = " " if name == "Llama 2" else ""  # which its template puts around an answer
    assert found == [f"{space}{TALK[place]['content']}{space}</s>" for place in (2, 4)]
    # where an earlier answer is written anew, it stands without weight in an example of its own
    assert len(examples) == (2 if "thoughts" in name else 1)
    for example, place in ((examples[0], 2), (examples[-1], 4)):
        asked = chat.ids(TALK[:place])
        assert example["inputs"][: len(asked)].tolist() == asked
        assert example["weights"][len(asked) - 2 : len(asked)].tolist() == [0, 1]
        assert example["inputs"][1:].tolist() == example["targets"][:-1].tolist()


def test_a_token_merged_across_the_border_is_taught() -> None:
    """The prompt ends with a letter that the tokenizer merges with the answer's first."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "c": 3}, [("a", "b")])
    )
    backend.add_special_tokens(["</s>"])
    template = (
        "{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    )
    talk = [{"role": "user", "content": "ca"}, {"role": "assistant", "content": "bc"}]
    (one,) = conversation_examples([talk], Chat(backend.to_str(), template, "</s>"), longest=9)
    assert one["inputs"].tolist() == [3, 2, 3] and one["weights"].tolist() == [1, 1, 1]


def test_long_conversations_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    long = [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "no"}]
    chat = chat_of(TEMPLATES["ChatML"])
    assert len(conversation_examples([TALK, long], chat, longest=100)) == 1
    assert "1 of 2 conversations are longer than 100 tokens" in caplog.text
    with pytest.raises(ConfigError, match="none of 1 fits 9 tokens"):
        conversation_examples([long], chat, longest=9)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages | length }}", "ends turn 2, an answer, with none of the tokens"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}</s>{{ add_generation_prompt }}",
         "begins turn 2, an answer, otherwise than it asks"),
        ("{{ raise_exception('no system') }}", "refuses this conversation"),
    ],
)  # fmt: skip
def test_templates_that_teach_nothing_are_one_line(template: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        conversation_examples([TALK], chat_of(template), longest=500)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="conversation 0: no message of the role 'assistant'"):
        conversation_examples([TALK[:2]], chat_of(TEMPLATES["ChatML"]), longest=500)
