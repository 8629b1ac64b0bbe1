"""Conversations as ids: the tokenizer and the chat template that come with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpjax.data.chat.chat_template import ChatTemplate, Message
from mpjax.data.tokenizers.tokenizer_file import open_tokenizer, tokenizer_errors
from mpjax.errors import ConfigError, need
from mpjax.typing import Json, Settings

__all__ = ["Chat", "ChatTemplate", "Message"]


class Chat:
    """Conversation to ids and back, special tokens included.

    A special token that a message spells out is taken for the token, as in `transformers`. The
    template writes the tokens around a conversation, so the tokenizer adds none.

    Args:
        tokenizer: text of a ``tokenizer.json``.
        template: Jinja template of a conversation, as `ChatTemplate` takes it.
        end: the token that ends an answer, or several, each as text or as id; the first that is
            text is the template's ``eos_token``.
        names: of the tokens that the template asks for, such as ``bos_token``.

    Attributes:
        ends: ids of the tokens that end an answer.
        end: the first of them.
        vocab_size: ids are 0 ... vocab_size - 1.

    Raises:
        ConfigError: jinja2 is not installed, a tokenizer or template with an error, or an end that
            is no token.

    Example:
        >>> import tokenizers
        >>> backend = tokenizers.Tokenizer(tokenizers.models.BPE({"h": 0, "i": 1}, []))
        >>> backend.add_special_tokens(["<e>"])
        1
        >>> template = "{% for m in messages %}{{ m.content }}<e>{% endfor %}"
        >>> chat = Chat(backend.to_str(), template, "<e>")
        >>> chat.ids([{"role": "user", "content": "hi"}]), chat.text([1, 0])
        ([0, 1, 2], 'i h')
    """

    def __init__(
        self,
        tokenizer: str,
        template: str,
        end: str | Sequence[str | int],
        names: Mapping[str, str] | None = None,
    ) -> None:
        need("jinja2", "chat", "chat")
        backend = open_tokenizer(tokenizer, "chat", "fetch the checkpoint again")
        ends = [end] if isinstance(end, str) else list(end)
        found = []
        for one in ends:
            place = backend.token_to_id(one) if isinstance(one, str) else one
            if place is None or backend.id_to_token(place) is None:
                raise ConfigError(
                    f"chat: the end token {one!r} is no token; fetch the checkpoint again"
                )
            found.append(place)
        if not found:
            raise ConfigError("chat: no end token; name the one that ends an answer")
        self._template = ChatTemplate(template)
        self._backend = backend
        texts = [one for one in ends if isinstance(one, str)]
        self._names = ({"eos_token": texts[0]} if texts else {}) | dict(names or {})
        self.ends: tuple[int, ...] = tuple(dict.fromkeys(found))
        self.end: int = self.ends[0]
        self.vocab_size: int = max(backend.get_vocab().values()) + 1

    def ids(self, messages: Sequence[Message], **variables: Json) -> list[int]:
        """The ids of a conversation, up to where the assistant is to speak.

        Args:
            messages: the turns.
            variables: `tools`, `documents` and what else `ChatTemplate.render` takes.

        Raises:
            ConfigError: a conversation that the template refuses.
        """
        settings: Settings = {"add_generation_prompt": True} | self._names | variables
        text = self._template.render(messages, **settings)
        with tokenizer_errors("chat"):
            return self._backend.encode(text, add_special_tokens=False).ids

    def shows(self, messages: Sequence[Message], tools: Sequence[Json]) -> bool:
        """Whether the template writes tools beside a conversation."""
        return self.ids(messages, tools=list(tools)) != self.ids(messages)

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        with tokenizer_errors("chat", "the tokenizer fails on these ids"):
            return self._backend.decode(list(ids), skip_special_tokens=True)
