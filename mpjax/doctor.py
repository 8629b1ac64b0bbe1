"""What this machine runs native, what it emulates, and what is not installed.

`python -m mpjax.doctor` prints it, `--json` gives the same to a program. See `mpjax.probe` for how
each statement about a number format is found out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mpjax import probe
from mpjax.errors import install_command

if TYPE_CHECKING:
    import rich.console
    import rich.table

FORMATS = (
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int8",
    "int4",
    "float4_e2m1fn",
)
EXTRAS = {
    "cuda12": ("jax_cuda12_plugin",),
    "cuda13": ("jax_cuda13_plugin",),
    "tpu": ("libtpu",),
    "hub": ("datasets", "huggingface_hub", "safetensors", "gguf"),
    "tasks": ("sklearn", "seqeval", "sacrebleu"),
    "chat": ("jinja2",),
    "parquet": ("pyarrow",),
    "novels": ("rdata",),
    "images": ("dm_pix",),
    "wandb": ("wandb",),
    "dev": ("pytest", "xdist", "hypothesis", "beartype", "ruff", "mypy", "pre_commit",
            "nbclient", "ipykernel", "nbformat", "equinox", "haiku", "diffrax", "optimistix",
            "sklearn", "seqeval", "sacrebleu", "jinja2", "safetensors", "gguf", "rdata", "dm_pix"),
    "docs": ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx_design", "sphinx_copybutton",
             "sphinx_math_dollar", "sphinx-mathjax-offline"),
}  # fmt: skip
PACKAGES = (
    "mpjax jax jaxlib flax optax jmp orbax-checkpoint grain tokenizers numpy ml_dtypes".split()
)
_SETTINGS = re.compile(r"XLA_|JAX_|LIBTPU_|CUDA_VISIBLE_DEVICES$|MPJAX_")


class _Child:
    """Answers from another process: a compiler that aborts ends that process and not this one."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.errors = tempfile.TemporaryFile("w+")

    def __call__(self, *question: str) -> dict[str, Any]:
        if self.process is None:
            # As a file, not as a module: the child needs JAX and nothing else of mpjax.
            self.process = subprocess.Popen(
                [sys.executable, "-P", probe.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(" ".join(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            return json.loads(answer)
        code = self._end()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
        died = f"the process ended with code {code}: {last}"
        return {"status": "unsupported", "detail": died, "error": died}

    def _end(self) -> int:
        if self.process is None:
            return 0
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        code = self.process.wait()
        self.process.stdout.close()
        self.process = None
        return code

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self.errors.close()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing_extras() -> dict[str, str]:
    """List the optional extras of which a package is not installed.

    Returns:
      For each missing extra the pip command that installs it.
    """
    return {
        extra: install_command(extra)
        for extra, modules in EXTRAS.items()
        if not all(importlib.util.find_spec(module) for module in modules)
    }


def report(ask: Callable[..., dict[str, Any]] = probe.answer) -> dict[str, Any]:
    """Examine this machine.

    Args:
      ask: answers `ask("machine")` and `ask(format, op)`; by default in this process.

    Returns:
      A JSON-ready dict: `versions`, `host`, `machine`, `formats[name][op]`, `missing_extras` and
      `settings` (environment variables that steer XLA, JAX or mpjax).

    Example:
      >>> sorted(report(lambda *question: {"error": "no device"}))
      ['formats', 'host', 'machine', 'missing_extras', 'settings', 'versions']
    """
    has_pages = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ())
    affinity = getattr(os, "sched_getaffinity", None)
    found = ask("machine")
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "host": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "usable_cores": len(affinity(0)) if affinity else os.cpu_count(),
            "memory_bytes": (
                os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if has_pages else None
            ),
        },
        "machine": found,
        "formats": (
            {} if "error" in found else {f: {op: ask(f, op) for op in probe.OPS} for f in FORMATS}
        ),
        "missing_extras": missing_extras(),
        "settings": {k: v for k, v in sorted(os.environ.items()) if _SETTINGS.match(k)},
    }


def _gigabytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"


def _cell(verdict: dict[str, Any], colour: bool) -> str:
    status = verdict["status"]
    text = f"{status}: {verdict['detail']}" if status != "unsupported" else status
    text = text.replace("native: computed in ", "native: ").replace(": computed in ", " in ")
    if "gflops" in verdict:
        text += f", {verdict['gflops']:g} GF/s"
    style = {"native": "green", "emulated": "yellow", "unsupported": "red"}[status]
    return f"[{style}]{text}[/]" if colour else text


def render(found: dict[str, Any], console: rich.console.Console) -> None:
    """Print a report as tables, in colour on a terminal and plain elsewhere.

    Args:
      found: what `report` returns.
      console: where to print.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    def table(title: str, *columns: str) -> rich.table.Table:
        lines = box.SIMPLE_HEAD if console.is_terminal else box.ASCII2
        return Table(*columns, title=title, title_justify="left", box=lines)

    here, host = found["machine"], found["host"]
    facts = table("machine", "what", "here")
    facts.add_row("versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v))
    facts.add_row("system", host["system"])
    facts.add_row("cores", f"{host['usable_cores']} of {host['cores']} usable")
    facts.add_row("memory", _gigabytes(host["memory_bytes"]))
    if "error" in here:
        facts.add_row("JAX", f"cannot start: {escape(here['error'])}")
    else:
        kinds = [
            d["kind"] + (f" ({_gigabytes(d['memory_bytes'])})" if d["memory_bytes"] else "")
            for d in here["devices"]
        ]
        counted = [f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds))]
        facts.add_row("backend", here["backend"])
        facts.add_row("devices", ", ".join(counted))
        bits = here["float32_matmul_bits"]
        facts.add_row("float32 products", f"keep {bits} of 24 significant bits of each operand")
        facts.add_row(
            "compile cache", here["compile_cache"] or "off: set JAX_COMPILATION_CACHE_DIR"
        )
    facts.add_row("settings", escape(" ".join(f"{k}={v}" for k, v in found["settings"].items())))
    console.print(facts)

    if found["formats"]:
        formats = table("number formats, as the compiled programs compute them", "format")
        for op, meaning in probe.OPS.items():
            formats.add_column(f"{meaning}\n{op}")
        refused: dict[str, list[str]] = {}
        for name, verdicts in found["formats"].items():
            formats.add_row(name, *(_cell(verdicts[op], console.is_terminal) for op in probe.OPS))
            for op, verdict in verdicts.items():
                if verdict["status"] == "unsupported":
                    refused.setdefault(verdict["detail"][:120], []).append(f"{name} {op}")
        console.print(formats)
        for reason, cases in refused.items():
            console.print(f"unsupported {', '.join(cases)}: {reason}", markup=False, soft_wrap=True)

    extras = table("extras that are not installed", "extra", "to install it")
    for extra, command in found["missing_extras"].items():
        extras.add_row(extra, escape(command))
    console.print(extras)


def main(argv: list[str] | None = None) -> int:
    """Print the report; exit status 1 when JAX cannot start a backend, else 0."""
    import rich.console

    parser = argparse.ArgumentParser(prog="python -m mpjax.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    options = parser.parse_args(argv)
    with _Child() as child:
        found = report(child)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        terminal = sys.stdout.isatty()
        render(found, rich.console.Console(width=None if terminal else 130, highlight=False))
    return 1 if "error" in found["machine"] else 0


if __name__ == "__main__":
    sys.exit(main())
