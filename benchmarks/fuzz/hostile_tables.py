"""Tables made by hand: JSON lines and lists, parquet, text.

A title that begins with `fine` marks a file that a reader may also take.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from typing import Any

from benchmarks.fuzz import mutants
from benchmarks.fuzz.hostile_settings import texts

Files = dict[str, bytes]


def lines(name: str) -> Callable[[Files], dict[str, Files]]:
    """Returns hostile JSON lines or JSON tables."""

    def hostile(good: Files) -> dict[str, Files]:
        found = dict(texts(b'{"text": "a", "label": "b"}'))
        for title in ("two values", "is []"):
            del found[title]
        if name == "t.json":
            found = {
                f"{'fine ' if 'fine' in t else ''}list {t}": b"[" + x + b"]"
                for t, x in found.items()
                if t not in ("UTF-16",)
            } | found
        for i, value in enumerate(mutants.ODD):
            row = json.dumps({"text": value, "label": "b"}).encode("utf-8", "surrogatepass")
            found[f"{'fine ' if isinstance(value, str) else ''}text {i}"] = row
            found[f"fine label {i}"] = json.dumps({"text": "a", "label": value}).encode(
                "utf-8", "surrogatepass"
            )
        found["300,000 objects"] = (
            b"{}\n" * 300_000 if name == "t.jsonl" else b"[" + b"{}," * 300_000 + b"{}]"
        )
        return {title: {name: data} for title, data in found.items()}

    return hostile


def parquets(good: Files) -> dict[str, Files]:
    """Returns hostile parquet files: few bytes of many rows, of long texts, of other types."""
    import pyarrow
    from pyarrow import parquet

    def file(text: Any, label: Any, **options: Any) -> bytes:
        out = io.BytesIO()
        parquet.write_table(pyarrow.table({"text": text, "label": label}), out, **options)
        return out.getvalue()

    found = {
        f"{n} equal rows": file(pyarrow.array(["a"] * n), pyarrow.array(["b"] * n))
        for n in (2 * 10**5, 10**6)
    }
    for kind in ("zstd", "gzip", "snappy", "brotli"):
        found[f"a text of 10^8 in {kind}"] = file(
            ["a" * 10**8, "b"], ["c", "d"], compression=kind, use_dictionary=False
        )
    for title, column in {
        "lists": [[1]],
        "structs": [{"a": 1}],
        "bytes": [b"\xff"],
        "times": [pyarrow.scalar(1)],
        "nested": [[[[[1]]]]],
    }.items():
        found[title] = file(column, ["b"])
    long = pyarrow.array(["a" * 10**6] * 1000).dictionary_encode()
    found["a text for all rows"] = file(long, ["b"] * 1000)
    for end in (0, 4, 8, 12, 100):
        found[f"cut at {end}"] = good["t.parquet"][:end]
    found["footer of 2^31"] = good["t.parquet"][:-8] + struct.pack("<I", 2**31) + b"PAR1"
    found["magic alone"] = b"PAR1PAR1"
    return {title: {"t.parquet": data} for title, data in found.items()}


def text_tables(good: Files) -> dict[str, Files]:
    """Returns hostile text tables."""
    found = {
        "a cell of 900,000": b"a" * 900_000,
        "quotes": b'"' * 10**6,
        "tabs": b"a" + b"\t" * 10**6,
        "NUL": b"a\tb\0",
        "lines": b"a" + b"\n" * 10**6,
        "one column": b"a\n" * 500_000,
        "fine rows": b"a\tb\nc\td\n" * 10**5,
        "UTF-16": "a\tb\n".encode("utf-16"),
        "no UTF-8": b"\xff\t\xfe",
        "carriage returns": b"\r" * 10**6 + b"a",
        "escapes": b"\x1b[2J\x07\tb\tc\n",
        "open quote": b'"a\tb\n' + b"c\td\n" * 10**5,
        "empty": b"",
        "blank": b"\n\n",
        "a header twice": b"text\tlabel\tlabel\na\tb\tc\n",
        "half a header": b"text\t\x1b[2J\na\tb\n",
        "fine wide header": b"text\tlabel"
        + b"\t\x1b[2Jx" * 10**5
        + b"\na\tb"
        + b"\tc" * 10**5
        + b"\n",
    }
    return {title: {"t.tsv": data} for title, data in found.items()}
