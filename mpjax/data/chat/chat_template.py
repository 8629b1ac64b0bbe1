"""Chat templates: the Jinja of a checkpoint, rendered as transformers renders it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpjax.errors import ConfigError, brief, need
from mpjax.typing import Json, Settings

Message = Mapping[str, Json]  # {"role": "user", "content": "..."}; roles system, user, assistant

# Names of a message's reasoning in published templates.
_REASONING = ("reasoning_content", "thinking", "reasoning")
# Seconds of CPU time; published templates take milliseconds. The limit of wall time is for systems
# without a CPU limit and for templates that wait; on a busy machine it is reached late.
_SECONDS, _WALL = 3.0, 60.0
_MEMORY, _LONGEST = 160 << 20, 4_000_000  # bytes and characters, for a short conversation
_MEMORY_EACH, _LONGEST_EACH = 30, 8  # and for each byte of the conversation


class ChatTemplate:
    """A conversation as text.

    Templates see what they see in transformers: `raise_exception`, `strftime_now`, a `tojson` that
    escapes nothing, `break` and `continue`, and `generation` blocks, which render what they hold.

    Args:
        template: Jinja; it is run in a sandbox, in a process of its own with limits of time,
            memory and length.

    Raises:
        ConfigError: jinja2 is not installed, or a template with an error.

    Example:
        >>> template = ChatTemplate("{% for m in messages %}<{{ m | tojson }}>{% endfor %}")
        >>> template.render([{"role": "user", "content": "a < b"}])
        '<{"role": "user", "content": "a < b"}>'
    """

    def __init__(self, template: str) -> None:
        need("jinja2", "chat", "chat")
        if not isinstance(template, str):
            raise ConfigError(f"chat: the template is {brief(template)}; give its text")
        self._template = template
        _render({"template": template})

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Json]] | None = None,
        documents: Sequence[Mapping[str, Json]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Json,
    ) -> str:
        """Returns the text of a conversation.

        Args:
            messages: the turns; an entry that is None counts as absent.
            tools: JSON schemas of functions that the model may call.
            documents: texts that it may read.
            add_generation_prompt: whether it ends where the assistant is to speak.
            variables: what else the template reads, such as `bos_token` or `enable_thinking`.

        Raises:
            ConfigError: messages that are no dicts, values that are no plain data, a conversation
                that the template refuses, or a template that fails on it or takes too much.
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
        variables |= {
            "messages": turns, "tools": tools, "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }  # fmt: skip
        return _render({"template": self._template, "variables": variables})


def _render(request: Settings) -> str:
    """Returns the text that the child renders; raises its error."""
    try:
        body = json.dumps(request, default=_plain).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"chat: the conversation is no plain data ({error}); give texts, numbers, lists, dicts"
        ) from None
    memory, longest = _MEMORY + _MEMORY_EACH * len(body), _LONGEST + _LONGEST_EACH * len(body)
    limits = json.dumps({"seconds": _SECONDS, "memory": memory, "longest": longest}).encode()
    # JSON escapes a character to 12 bytes at most
    found = _CHILD.ask(limits + b"\n" + body + b"\n", 12 * longest + 100)
    if "text" in found:
        return str(found["text"])
    said = {
        "malformed": "is malformed ({}); fetch it again",
        "refused": "refuses this conversation ({})",
        "failed": (
            "fails on this conversation ({}); give the messages and variables that it reads, or"
            " fetch it again"
        ),
        "large": f"writes more than {longest:,} characters; fetch it again",
        "stopped": (
            f"takes more than {_SECONDS:g} s of a core or {memory >> 20:,} MB; fetch it again"
        ),
    }
    ((why, reason),) = found.items()
    raise ConfigError(f"chat: the template {said[why].format(reason)}")


def _plain(x: object) -> dict[str, Json] | list[Json]:
    """Mappings and sequences of other types as JSON has them."""
    if isinstance(x, Mapping):
        return dict(x)
    if isinstance(x, Sequence) and not isinstance(x, bytes | bytearray | memoryview):
        return list(x)
    raise TypeError(f"a {type(x).__name__} in it")


class _Child:
    """The child process that renders all templates, from the first request to our exit."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize | None = None
        self._parent = 0

    def ask(self, lines: bytes, most: int) -> dict[str, str]:
        """Returns the answer to a request; of a child that its limits ended, `stopped`.

        Args:
          lines: the limits, and the request.
          most: bytes of the answer.
        """
        with self._lock:
            try:
                child = self._started()
                child.stdin.write(lines)  # type: ignore[union-attr]
                child.stdin.flush()  # type: ignore[union-attr]
                clock = threading.Timer(_WALL, child.kill)
                clock.start()
                try:
                    answer = child.stdout.readline(most)  # type: ignore[union-attr]
                finally:
                    clock.cancel()
            except BrokenPipeError:
                answer = b""
            except BaseException:  # an interrupt between a request and its answer
                self._stop()
                raise
            found = dict(json.loads(answer)) if answer.endswith(b"\n") else {"stopped": ""}
            if "stopped" in found:  # its memory limit may fail the next request
                self._stop()
            return found

    def _started(self) -> subprocess.Popen[bytes]:
        if self._parent != os.getpid():  # after a fork the pipes are the parent's
            self._process, self._parent = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("template_child.py"))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self._end = weakref.finalize(self, _end, self._process, os.getpid())
            start = {"path": [os.path.abspath(p) for p in sys.path]}
            self._process.stdin.write(json.dumps(start).encode() + b"\n")  # type: ignore[union-attr]
        return self._process

    def _stop(self) -> None:
        if self._process is not None and self._end is not None:
            self._end()
        self._process = None


def _end(process: subprocess.Popen[bytes], parent: int) -> None:
    if parent == os.getpid():
        process.kill()
        process.communicate()


_CHILD = _Child()
