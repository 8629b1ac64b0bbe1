"""Conversations as sequences whose loss is taken on what the assistant says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from mpjax.data.chat.chat import Chat
from mpjax.data.chat.chat_template import Message
from mpjax.data.chat.instructions import taught_examples
from mpjax.data.tokenizers.wordpiece import Example
from mpjax.errors import ConfigError
from mpjax.typing import Json


def conversation_examples(
    conversations: Sequence[Sequence[Message]],
    chat: Chat,
    *,
    longest: int,
    tools: Sequence[Sequence[Json]] = (),
) -> list[Example]:
    """Conversations by their chat template; all but the assistant's answers has weight 0.

    An answer is read behind the ids that `Chat.ids` gives for the turns before it, as a model is
    asked for it, and ends with an end token. A conversation is one example; where the template
    writes an earlier turn otherwise once others follow it, such as without its thoughts, the
    answers from there on are an example of their own.

    Args:
        conversations: the turns of each, at least one of them of the role `assistant`.
        chat: tokenizer and template.
        longest: tokens at most; an example that is longer is left out, which is logged.
        tools: of each conversation the JSON schemas of functions that the model may call.

    Returns:
        ``{"inputs", "targets", "weights", "keep"}`` of each, as `instruction_examples`.

    Raises:
        ConfigError: tools of more or fewer conversations, a conversation without an answer, a
            template that refuses one, that ends an answer with no end token or begins it otherwise
            than it asks for it, or no example is short enough.

    Example:
        >>> import tokenizers
        >>> backend = tokenizers.Tokenizer(tokenizers.models.BPE({"h": 0, "i": 1}, []))
        >>> backend.add_special_tokens(["<e>"])
        1
        >>> template = "{% for m in messages %}{{ m.content }}<e>{% endfor %}"
        >>> chat = Chat(backend.to_str(), template, "<e>")
        >>> talk = [{"role": "user", "content": "h"}, {"role": "assistant", "content": "hi"}]
        >>> one = conversation_examples([talk], chat, longest=8)[0]
        >>> one["inputs"].tolist(), one["targets"].tolist(), one["weights"].tolist()
        ([0, 2, 0, 1], [2, 0, 1, 2], [0.0, 1.0, 1.0, 1.0])
    """
    if tools and len(tools) != len(conversations):
        raise ConfigError(
            f"tools: of {len(tools)} conversations, there are {len(conversations)}; give a list for"
            " each"
        )
    talks = itertools.zip_longest(conversations, tools)
    parts = (
        part
        for number, (messages, functions) in enumerate(talks)
        for part in _parts(messages, functions or None, chat, f"conversation {number}")
    )
    return taught_examples(parts, "conversations", len(conversations), longest)


def _parts(
    messages: Sequence[Message], tools: Sequence[Json] | None, chat: Chat, where: str
) -> Iterator[tuple[list[int], list[bool]]]:
    """The ids of a conversation, and which of them are of answers."""
    ids: list[int] = []
    taught: list[bool] = []
    for place, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        asked = chat.ids(messages[:place], tools=tools)
        whole = chat.ids(messages[: place + 1], tools=tools, add_generation_prompt=False)
        start = _alike(asked, whole)
        if start < len(asked) - 1:  # the tokenizer may merge the last token with the answer's first
            raise ConfigError(
                f"{where}: the template begins turn {place}, an answer, otherwise than it asks for"
                " it; take another template"
            )
        stop = max((i + 1 for i in range(start, len(whole)) if whole[i] in chat.ends), default=0)
        if not stop:
            raise ConfigError(
                f"{where}: the template ends turn {place}, an answer, with none of the tokens"
                f" {chat.ends}; take another template"
            )
        if ids and asked[: len(ids)] != ids:
            yield ids, taught
            taught = []
        taught += [False] * (start - len(taught)) + [True] * (stop - start)
        ids = whole[:stop]
    if not ids:
        raise ConfigError(f"{where}: no message of the role 'assistant'; drop it or add its answer")
    yield ids, taught


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
