"""Conversations as ids: the tokenizer and the chat template that come with a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

from mpjax.errors import ConfigError, need

Message = dict[str, str]  # {"role": "user", "content": "..."}; roles system, user, assistant


class Chat:
    """Conversation to ids and back, special tokens included.

    A special token that a message spells out is taken for the token, as in `transformers`.

    Args:
        tokenizer: text of a ``tokenizer.json``.
        template: Jinja template of a conversation; it is run in a sandbox.
        end: the token that ends an answer.
        names: of the tokens that the template asks for, such as ``bos_token``.

    Raises:
        ConfigError: jinja2 is not installed, a tokenizer or template with an error, or an end that
            is no token.

    Example:
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
        end: str,
        names: dict[str, str] | None = None,
    ) -> None:
        sandbox = need("jinja2.sandbox", "chat", "chat")
        self._errors = need("jinja2", "chat", "chat").TemplateError
        try:
            backend = tokenizers.Tokenizer.from_str(tokenizer)
        except Exception as error:  # the package raises nothing narrower
            raise ConfigError(
                f"chat: not a tokenizer.json ({error}); fetch the checkpoint again"
            ) from None
        backend.no_truncation()
        backend.no_padding()
        found = backend.token_to_id(end)
        if found is None:
            raise ConfigError(
                f"chat: the end token {end!r} is no token; fetch the checkpoint again"
            )
        environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = self._refuse
        try:
            self._template = environment.from_string(template)
        except self._errors as error:
            raise ConfigError(
                f"chat: the template is malformed ({error}); fetch it again"
            ) from None
        self._backend = backend
        self._names = {"eos_token": end} | (names or {})
        self.end: int = found
        self.vocab_size: int = max(backend.get_vocab().values()) + 1

    def _refuse(self, message: str) -> None:
        raise self._errors(message)

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation, up to where the assistant is to speak.

        Raises:
            ConfigError: a conversation that the template refuses.
        """
        try:
            text = self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._names
            )
        except self._errors as error:
            raise ConfigError(
                f"chat: the template refuses this conversation ({error}); let user and assistant"
                " take turns"
            ) from None
        return self._backend.encode(text, add_special_tokens=False).ids

    def text(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=True)
