"""The program that renders a chat template, in a process of its own (see `ChatTemplate`).

A template is untrusted code. Jinja's sandbox denies it files and the network, but bounds neither
time nor memory, so it runs in this process under limits of the kernel. Requests and answers are
lines of JSON. This file imports nothing of mpjax, whose import is slower than most templates.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import nodes, parser, sandbox

    from mpjax.typing import Settings

_SAID = 4000  # characters of an error


def limit(seconds: float, memory: int) -> None:
    """Sets what this process may take: seconds of a core from now on, and bytes."""
    try:
        import resource
    except ImportError:  # on Windows only the parent's timer limits it
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    end = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    most = ((resource.RLIMIT_CPU, end), (resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0))
    for kind, value in most:
        hard = resource.getrlimit(kind)[1]
        inside = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (inside, hard))


def environment(refuse: Callable[[str], None]) -> sandbox.SandboxedEnvironment:
    """Returns Jinja as transformers sets it up for templates; `refuse` takes a message."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The tag of what an assistant said; transformers masks by it, the text is the same."""

        tags = {"generation"}

        def parse(self, source: parser.Parser) -> nodes.Node:
            line = next(source.stream).lineno
            body = source.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    found = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    found.filters["tojson"] = to_json
    found.globals["raise_exception"] = refuse
    found.globals["strftime_now"] = now
    return found


def to_json(
    x: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns JSON as transformers' filter does, which escapes nothing for HTML."""
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def now(form: str) -> str:
    """Returns the local time, as templates mean it."""
    return datetime.datetime.now().strftime(form)


class Renderer:
    """Renders templates; the last one is kept as compiled."""

    def __init__(self) -> None:
        import jinja2

        self._refusal: type[Exception] = type("Refusal", (jinja2.TemplateError,), {})
        self._environment = environment(self._refuse)
        self._last, self._template = "", self._environment.from_string("")

    def _refuse(self, message: str) -> None:
        raise self._refusal(message)

    def answer(self, request: Settings, longest: int) -> dict[str, str]:
        """Returns `text`, or why there is none: `malformed refused failed large stopped`.

        Args:
          request: `template`; with `variables` it is rendered, else looked at.
          longest: characters of a text that is taken.
        """
        try:
            if request["template"] != self._last:
                self._template = self._environment.from_string(request["template"])
                self._last = request["template"]
        except MemoryError:
            return {"stopped": ""}
        except Exception as error:  # also a template nested too deep
            return {"malformed": _said(error)}
        if "variables" not in request:
            return {"text": ""}
        parts, size = [], 0
        try:
            for part in self._template.generate(request.get("variables", {})):
                parts.append(part)
                size += len(part)
                if size > longest:
                    return {"large": ""}
        except MemoryError:
            return {"stopped": ""}
        except self._refusal as error:
            return {"refused": str(error)[:_SAID]}
        except Exception as error:  # a template may call what raises any exception
            return {"failed": f"{type(error).__name__}: {error}"[:_SAID]}
        return {"text": "".join(parts)}


def _said(error: Exception) -> str:
    return (str(error) or type(error).__name__)[:_SAID]


def main() -> None:
    """Answers pairs of lines: what a request may take, and the request."""
    start = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = start["path"]
    renderer = Renderer()  # before limits are set
    for line in sys.stdin.buffer:
        limits = json.loads(line)
        limit(limits["seconds"], limits["memory"])
        found = renderer.answer(json.loads(sys.stdin.buffer.readline()), limits["longest"])
        sys.stdout.buffer.write(json.dumps(found).encode("ascii") + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
