"""Series of hostile files: each field of a format with each value that could mislead a reader.

All titles begin with `fine`: some of these files say something that a reader may take; what counts
is that none is executed, hangs, takes memory or ends in a traceback.
"""

from __future__ import annotations

import io
import itertools
import json
import lzma
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

from benchmarks.fuzz import mutants

Files = dict[str, bytes]

NUMBERS = (0, 1, 2**8 - 1, 2**16 - 1, 2**31 - 1, 2**32 - 1)
# (offset, width) of the numbers in zip's central and local headers.
CENTRAL = ((4, 2), (6, 2), (8, 2), (10, 2), (12, 2), (14, 2), (16, 4), (20, 4), (24, 4), (28, 2),
           (30, 2), (32, 2), (34, 2), (36, 2), (38, 4), (42, 4))  # fmt: skip
LOCAL = ((4, 2), (6, 2), (8, 2), (10, 2), (12, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))


def zip_fields(good: Files) -> dict[str, Files]:
    """Each number in the headers of the pickle's entry of a torch zip, with each value."""
    name = "pytorch_model.bin"
    data, found = good[name], {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = next(one for one in archive.infolist() if one.filename.endswith("data.pkl"))
        central = archive.start_dir
        for one in archive.infolist():
            if one is info:
                break
            central += 46 + len(one.filename.encode()) + len(one.extra) + len(one.comment)
    for where, start, fields in (
        ("central", central, CENTRAL), ("local", info.header_offset, LOCAL)
    ):  # fmt: skip
        for (offset, width), number in itertools.product(fields, NUMBERS):
            new = bytearray(data)
            value = (number % 256**width).to_bytes(width, "little")
            new[start + offset : start + offset + width] = value
            found[f"fine {where} header {offset}: {number}"] = {name: bytes(new)}
    return found


def json_values(good: Files, *names: str) -> dict[str, Files]:
    """Each value of JSON files, in turn, replaced by each odd one."""
    found = {}
    for name in names:
        page = json.loads(good[name])
        for path, odd in itertools.product(_some_places(page), enumerate(mutants.ODD)):
            text = json.dumps(_with(page, path, odd[1])).encode("utf-8", "surrogatepass")
            found[f"fine {name} {'.'.join(map(str, path))} odd {odd[0]}"] = {name: text}
    return found


def _some_places(page: Any) -> list[tuple[Any, ...]]:
    """The way to each part of a JSON value; of many equal ones, to the first."""
    found: list[tuple[Any, ...]] = []
    items: Any = page.items() if isinstance(page, dict) else enumerate(page)
    for key, value in itertools.islice(items, 6):
        found.append((key,))
        if isinstance(value, dict | list):
            found += [(key, *rest) for rest in _some_places(value)[:2]]
    return found


def _with(page: Any, path: tuple[Any, ...], value: Any) -> Any:
    new = json.loads(json.dumps(page))
    holder = new
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return new


def frame_opcodes(good: Files) -> dict[str, Files]:
    """A frame's pickle cut at each of its opcodes, and with each left out or said twice."""
    whole = lzma.decompress(good["table.xz"])
    places = [at for _, _, at in pickletools.genops(whole) if at is not None]
    found = {}
    for start, end in itertools.pairwise([*places, len(whole)]):
        for title, data in (
            ("cut", whole[:start] + b"."), ("left out", whole[:start] + whole[end:]),
            ("twice", whole[:end] + whole[start:]), ("popped", whole[:end] + b"0" + whole[end:]),
        ):  # fmt: skip
            found[f"fine opcode at {start} {title}"] = {"table.xz": lzma.compress(data)}
    return found


def rows(name: str) -> dict[str, Files]:
    """A table of JSON with each odd value in each cell, as a row, and as a further column."""
    found = {}
    for (i, odd), at in itertools.product(enumerate(mutants.ODD), (0, 3, 7)):
        for title, row in (
            ("text", {"text": odd, "label": "no"}), ("label", {"text": "a", "label": odd}),
            ("more", {"text": "a", "label": "no", "more": odd}), ("row", odd),
        ):  # fmt: skip
            table: list[Any] = [{"text": f"t {n}", "label": "yes"} for n in range(8)]
            table[at] = row
            lines = [json.dumps(one).encode("utf-8", "surrogatepass") for one in table]
            data = b"[" + b",".join(lines) + b"]" if name == "t.json" else b"\n".join(lines)
            found[f"fine {title} {i} in row {at}"] = {name: data}
    return found


def parquet_bytes(good: Files) -> dict[str, Files]:
    """A parquet file cut at many places, and with each early byte of its footer replaced."""
    name = "t.parquet"
    data = good[name]
    (length,) = struct.unpack("<I", data[-8:-4])
    footer = len(data) - 8 - length
    cuts = {f"fine cut {i} of 64": data[: i * len(data) // 64] for i in range(64)}
    changed = {}
    for offset, value in itertools.product(range(min(80, length)), (0x00, 0x7F, 0xFF)):
        new = bytearray(data)
        new[footer + offset] = value
        changed[f"fine footer byte {offset}: {value}"] = bytes(new)
    lengths = {
        f"fine footer of {n}": data[:-8] + struct.pack("<I", n) + data[-4:]
        for n in (0, 1, length - 1, length + 1, len(data), 2**31 - 1, 2**32 - 1)
    }
    return {title: {name: new} for title, new in (cuts | changed | lengths).items()}


def cells() -> dict[str, Files]:
    """A text table with each odd cell, control characters too, at each place, plain and quoted."""
    name, odd = "t.tsv", list(_odd_cells())
    found = {}
    for (i, cell), row, column in itertools.product(enumerate(odd), (0, 1, 3), (0, 1)):
        for quoted in (False, True):
            table = [[b"text", b"label"], [b"a", b"b"], [b"c", b"d"], [b"e", b"f"]]
            table[row][column] = b'"' + cell.replace(b'"', b'""') + b'"' if quoted else cell
            data = b"".join(b"\t".join(line) + b"\n" for line in table)
            found[f"fine cell {i} at {row} {column} {'quoted' * quoted}"] = {name: data}
    return found


def _odd_cells() -> Iterator[bytes]:
    yield from (
        b"",
        b" ",
        b'"',
        b'""',
        b"'",
        b"\\",
        b"\\t",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
    )
    yield from (b"a" * 10**5, b"\xe2\x80\xae", b"=1+1", b"nan", b"-0", b"1e999", b"#", b"\x1b[2J")
    yield from (bytes([n]) for n in (*range(9), *range(11, 32), 127))
