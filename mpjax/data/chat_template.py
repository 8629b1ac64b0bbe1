"""Chat templates: the Jinja of a checkpoint, rendered as transformers renders it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mpjax.errors import ConfigError, brief, need

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}; roles system, user, assistant

# Names that checkpoints use for what a model thought; templates read the last two.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A conversation as text.

    Templates see what they see in transformers: `raise_exception`, `strftime_now`, a `tojson` that
    escapes nothing, `break` and `continue`, and `generation` blocks, which render what they hold.

    Args:
        template: Jinja; it is run in a sandbox.

    Raises:
        ConfigError: jinja2 is not installed, or a template with an error.

    Example:
        >>> template = ChatTemplate("{% for m in messages %}<{{ m | tojson }}>{% endfor %}")
        >>> template.render([{"role": "user", "content": "a < b"}])
        '<{"role": "user", "content": "a < b"}>'
    """

    def __init__(self, template: str) -> None:
        jinja2 = need("jinja2", "chat", "chat")
        sandbox = need("jinja2.sandbox", "chat", "chat")
        self._refusal: Any = type("Refusal", (jinja2.TemplateError,), {})
        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _generation_blocks(jinja2)],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = self._refuse
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(template)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"chat: the template is malformed ({error}); fetch it again"
            ) from None

    def _refuse(self, message: str) -> None:
        raise self._refusal(message)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Returns the text of a conversation.

        Args:
            messages: the turns; an entry that is None counts as absent.
            tools: JSON schemas of functions that the model may call.
            documents: texts that it may read.
            add_generation_prompt: whether it ends where the assistant is to speak.
            variables: what else the template reads, such as `bos_token` or `enable_thinking`.

        Raises:
            ConfigError: messages that are no dicts, a conversation that the template refuses, or a
                template that fails on it.
        """
        if isinstance(messages, str | Mapping) or not all(isinstance(m, Mapping) for m in messages):
            raise ConfigError(
                f"chat: {brief(messages)}; give messages, such as"
                ' [{"role": "user", "content": "hello"}]'
            )
        turns = [{name: x for name, x in m.items() if x is not None} for m in messages]
        for i, turn in enumerate(turns):
            if thoughts := [turn[name] for name in _REASONING if name in turn]:
                turns[i] = {"thinking": thoughts[0]} | turn | {"reasoning_content": thoughts[0]}
        try:
            return self._template.render(
                messages=turns, tools=tools, documents=documents,
                add_generation_prompt=add_generation_prompt, **variables,
            )  # fmt: skip
        except self._refusal as error:
            raise ConfigError(f"chat: the template refuses this conversation ({error})") from None
        # A template is a program: what it calls may raise anything.
        except Exception as error:
            raise ConfigError(
                f"chat: the template fails on this conversation ({type(error).__name__}: {error});"
                " give the messages and variables that it reads, or fetch it again"
            ) from None


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)  # noqa: DTZ005  (local, as the templates mean)


def _generation_blocks(jinja2: Any) -> Any:
    """The tag of what an assistant said; transformers makes masks of it, the text is the same."""

    class Generation(need("jinja2.ext", "chat", "chat").Extension):  # type: ignore[misc]
        tags = {"generation"}  # noqa: RUF012  (as jinja2 reads it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return caller()

    return Generation
