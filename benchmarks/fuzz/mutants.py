"""Damage: of bytes, of a JSON value, and of what lies inside zip archives and safetensors."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from typing import Any

# Numbers that are one off, too large, negative, or of another kind where a size belongs.
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 64, 255, 256, 1000, 65537, 10**6, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53,
    2**63 - 1, 2**63, 2**64, 10**12, 10**30, 10**400, -(2**63), 0.5, -0.0, 1e-320, 1e308,
)  # fmt: skip
ODD: tuple[Any, ...] = (
    *NUMBERS, None, True, False, "", "x", "-1", "NaN", "\x1b[2J\x07", "\ud800", "a" * 5000, [], {},
    [[]], [None], {"a": {}}, ["x"] * 300, [[[[]]]], {"": None}, float("inf"), float("nan"),
    "../../etc/passwd", "/etc/passwd", "\0", "none", "float32", "gelu", "llama", [0], [-1], [1.5],
)  # fmt: skip


def bytes_mutant(data: bytes, rng: Any, most: int = 4) -> bytes:
    """Returns data with up to a few spots flipped, overwritten, cut out, repeated or cut off."""
    new = bytearray(data)
    for _ in range(rng.integers(1, most + 1)):
        if not new:
            return bytes(rng.integers(0, 256, 9, dtype="uint8"))
        at, length = int(rng.integers(len(new))), int(rng.integers(1, 17))
        match rng.integers(8):
            case 0:
                new[at] ^= 1 << int(rng.integers(8))
            case 1:
                new[at] = int(rng.integers(256))
            case 2:
                number = int(NUMBERS[rng.integers(len(NUMBERS))]) % 2**64
                width = int(rng.choice([1, 2, 4, 8]))
                new[at : at + width] = (number % 256**width).to_bytes(width, "little")
            case 3:
                del new[at : at + length]
            case 4:
                new[at:at] = new[at : at + length] * int(rng.integers(1, 5))
            case 5:
                new[at:at] = rng.integers(0, 256, length, dtype="uint8").tobytes()
            case 6:
                other = int(rng.integers(len(new)))
                new[at : at + length] = new[other : other + length]
            case _:
                if rng.integers(4) == 0:
                    del new[at:]
    return bytes(new)


def value_mutant(value: Any, rng: Any, most: int = 3) -> Any:
    """Returns a JSON value with up to a few of its parts replaced, renamed, taken out or nested."""
    value = copy.deepcopy(value)
    for _ in range(rng.integers(1, most + 1)):
        spots = _spots(value)
        if not spots:
            return _odd(rng)
        holder, key = spots[rng.integers(len(spots))]
        match rng.integers(6):
            case 0 | 1 | 2:
                holder[key] = _odd(rng)
            case 3:
                del holder[key]
            case 4:
                other, place = spots[rng.integers(len(spots))]
                if place in other if isinstance(other, dict) else place < len(other):
                    holder[key] = copy.deepcopy(other[place])
            case _:
                if isinstance(holder, dict):
                    holder[f"{key}\x1b[31m{rng.integers(9)}"] = holder.pop(key)
                else:
                    holder.insert(key, copy.deepcopy(holder[key]))
    return value


def _odd(rng: Any) -> Any:
    return copy.deepcopy(ODD[rng.integers(len(ODD))])


def _spots(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    queue = [value]
    for one in queue:
        if isinstance(one, dict | list) and len(found) < 5000:
            keys = list(one) if isinstance(one, dict) else range(len(one))
            found += [(one, key) for key in keys]
            queue += [one[key] for key in keys]
    return found


def json_mutant(data: bytes, rng: Any) -> bytes:
    """Returns a JSON file with a part of its value, or some of its bytes, changed."""
    if rng.integers(4) == 0:
        return bytes_mutant(data, rng)
    text = json.dumps(value_mutant(json.loads(data), rng))
    return text.encode("utf-8", "surrogatepass")


def zip_mutant(data: bytes, rng: Any, inner: str) -> bytes:
    """Returns a zip archive with bytes of itself, or of one of its entries, changed."""
    if rng.integers(2):
        return bytes_mutant(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            held = old.read(info)
            new.writestr(info, bytes_mutant(held, rng) if info.filename == inner else held)
    return out.getvalue()


def header_mutant(data: bytes, rng: Any) -> bytes:
    """Returns safetensors with its header's value, or bytes of it, changed."""
    if rng.integers(3) == 0:
        return bytes_mutant(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = value_mutant(json.loads(data[8 : 8 + length]), rng)
    return safetensors(json.dumps(header).encode("utf-8", "surrogatepass"), data[8 + length :])


def safetensors(header: bytes, body: bytes) -> bytes:
    """Returns a safetensors file of a header and the bytes behind it."""
    return len(header).to_bytes(8, "little") + header + body
