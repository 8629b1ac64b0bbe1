"""Opens a tokenizer.json from an untrusted source."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import tokenizers

from mpjax.data.cache import Cache
from mpjax.data.tokenizers.tokenizer_bounds import check_ids, unbounded
from mpjax.errors import ConfigError, printable
from mpjax.json_text import parse_json
from mpjax.typing import Json

# Seconds of CPU time, and of wall time for systems without a CPU limit.
_SECONDS, _WALL = 3.0, 60.0
_MEMORY, _MEMORY_EACH = 100 << 20, 10  # bytes, and bytes for each byte of the file


def open_tokenizer(
    text: str | bytes, where: str, remedy: str = "fetch it again"
) -> tokenizers.Tokenizer:
    """Returns what a tokenizer.json describes, without its truncation and padding.

    Its ids are bounded by the number of its tokens. Where the cost of a part cannot be told by
    reading it, such as a regex or a table of replacements, it is tried first in a process of its
    own, with limits of time and memory, on 64 kB of text in several scripts; the cache remembers by
    checksum those that passed.

    Args:
        text: of the file.
        where: the file, for errors.
        remedy: what to do about it.

    Raises:
        ConfigError: it is something else, has absurd ids, fails on text, or takes too much.

    Example:
        >>> made = tokenizers.Tokenizer(tokenizers.models.BPE({"h": 0, "i": 1}, []))
        >>> open_tokenizer(made.to_str(), "tokenizer.json").encode("hi").ids
        [0, 1]
    """
    return build_tokenizer(
        parse_json(text, where, "expected a tokenizer.json"), text, where, remedy
    )


def build_tokenizer(
    fields: Json, text: str | bytes, where: str, remedy: str = "fetch it again"
) -> tokenizers.Tokenizer:
    """What `open_tokenizer` returns of a text, `fields`, that has been parsed already."""
    if not isinstance(fields, dict) or "model" not in fields:
        raise ConfigError(f"{where}: JSON without a model; expected a tokenizer.json")
    check_ids(fields, where, remedy)
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    data = data.removeprefix(b"\xef\xbb\xbf")
    if part := unbounded(fields):
        _try(data, where, part, remedy)
    with tokenizer_errors(where, "not a tokenizer.json", remedy):
        backend = tokenizers.Tokenizer.from_buffer(data)
        backend.no_truncation()
        backend.no_padding()
    return backend


@contextlib.contextmanager
def tokenizer_errors(
    where: str, what: str = "the tokenizer fails on this text", remedy: str = "fetch it again"
) -> Iterator[None]:
    """Turns an exception or Rust panic of the package into an error of one line.

    Raises:
        ConfigError: the block raised an exception of the package.
    """
    try:
        yield
    except BaseException as error:
        # The package raises these two; a Rust panic is a BaseException without a public name.
        known = type(error) in (Exception, ValueError)
        if not known and type(error).__name__ != "PanicException":
            raise
        reason = printable(str(error), 200)
        raise ConfigError(f"{where}: {what} ({reason}); {remedy}") from None


def _try(data: bytes, where: str, part: str, remedy: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    found = _tried(digest)
    if not found:
        found = _child(data)
        if "fine" in found:
            name = _name(digest)
            Cache().store(name, lambda file: file.write(b"fine"))
            _tried.cache_clear()
    if "fine" in found:
        return
    ((why, reason),) = found.items()
    said = {
        "malformed": f"not a tokenizer.json ({printable(reason, 200)})",
        "failed": f"the tokenizer fails on plain text ({printable(reason, 200)})",
        "stopped": (
            f"the tokenizer takes more than {_SECONDS:g} s of a core or"
            f" {_allowed(data) >> 20:,} MB for 64 kB of text (its {part})"
        ),
    }
    raise ConfigError(f"{where}: {said[why]}; {remedy}")


def _name(digest: str) -> str:
    return f"{digest[:32]}.{tokenizers.__version__}.tried"


@functools.lru_cache(maxsize=64)
def _tried(digest: str) -> dict[str, str]:
    return {"fine": ""} if Cache().find(_name(digest)) else {}


def _allowed(data: bytes) -> int:
    return _MEMORY + _MEMORY_EACH * len(data)


def _child(data: bytes) -> dict[str, str]:
    """What the child says of a tokenizer; of one that its limits ended, `stopped`."""
    start = {
        "path": [os.path.abspath(p) for p in sys.path], "seconds": _SECONDS,
        "memory": _allowed(data),
    }  # fmt: skip
    quiet = {"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).with_name("tokenizer_child.py"))],
            input=json.dumps(start).encode() + b"\n" + data, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, timeout=_WALL, check=False, env=os.environ | quiet,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"stopped": ""}
    return dict(json.loads(done.stdout)) if done.stdout.endswith(b"\n") else {"stopped": ""}
