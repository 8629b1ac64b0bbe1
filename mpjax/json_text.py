"""JSON that somebody else wrote: bounds before it is parsed, and one line where it cannot be."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mpjax.errors import ConfigError, printable

LARGEST = 2**26  # bytes of a file of settings; an index of 10^5 tensors has a sixth of them
_FEW = 1000  # keys
_DEEPEST = 100  # objects and lists inside each other; `json` and `repr` fail near 1000
# A byte -> what it adds to the depth; all other bytes are taken out first.
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
_OTHERS = bytes(set(range(256)) - set(b"[{]}"))
_ESCAPED = re.compile(rb"\\.", re.DOTALL)  # a quote behind a backslash ends no string


def parse_json(text: str | bytes, where: str, remedy: str = "fetch it again") -> Any:
    """Returns what JSON text says.

    Args:
      text: as text or as UTF-8, with a byte order mark or without.
      where: the file, for errors.
      remedy: what to do about text that is no JSON.

    Raises:
      ConfigError: it is no JSON, too deep, or has a key twice in one object: which of the two holds
        differs from reader to reader.

    Example:
      >>> parse_json('{"width": 16}', "config.json")
      {'width': 16}
      >>> parse_json("[" * 1000, "config.json")
      Traceback (most recent call last):
      mpjax.errors.ConfigError: config.json: not JSON (1000 levels deep); fetch it again
    """
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        if text.count(":") <= _FEW and text.count("[") + text.count("{") <= _DEEPEST:
            return json.loads(text, object_pairs_hook=_object)  # such as a line of a table
        depth, pairs = _outline(text)
        if depth > _DEEPEST:
            raise ValueError(f"{depth} levels deep")
        counted = _Counted()
        value = json.loads(text, object_hook=counted)
        if counted.pairs < pairs:
            json.loads(text, object_pairs_hook=_object)  # names the key
        return value
    except ValueError as error:  # a JSON or a Unicode error is one; so is a number of 5000 digits
        reason = printable(str(error).partition("; use sys.")[0], 200)
        raise ConfigError(f"{where}: not JSON ({reason}); {remedy}") from None


def read_json(path: Path, remedy: str = "fetch it again") -> dict[str, Any]:
    """Returns the object that a JSON file of settings holds.

    Args:
      path: the file.
      remedy: what to do about a file that is something else.

    Raises:
      ConfigError: no such file, one beyond 64 MiB, or something else in it.
    """
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise ConfigError(
                f"{path}: {size} bytes; expected settings, of at most {LARGEST}; {remedy}"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; name the folder that a checkpoint was saved to"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    found = parse_json(data, str(path), remedy)
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected a JSON object, got a {type(found).__name__}; {remedy}")
    return found


def _outline(text: str) -> tuple[int, int]:
    """How deep objects and lists are inside each other, and how many keys they have."""
    data = np.frombuffer(_ESCAPED.sub(b"", text.encode("utf-8", "replace")), np.uint8)
    bare = data[~np.logical_xor.accumulate(data == ord('"'))].tobytes()  # outside of strings
    steps = np.frombuffer(bare.translate(_STEPS, _OTHERS), np.int8)
    return int(steps.cumsum(dtype=np.int64).max(initial=0)), bare.count(b":")


class _Counted:
    """Counts the keys of objects as they are made.

    A list of an object's pairs takes a tuple for each: of a vocabulary so many that Python collects
    its garbage, which takes 0.1 s with JAX.
    """

    def __init__(self) -> None:
        self.pairs = 0

    def __call__(self, found: dict[str, Any]) -> dict[str, Any]:
        self.pairs += len(found)
        return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {printable(repr(twice), 60)} twice in one object")
    return found
