"""Jane Austen's novels, a chapter a document, from the files in which R keeps a package's data."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable

from common.datasets.assets import fetch
from mpjax.errors import need
from mpjax.typing import Json

_CHAPTER = re.compile(r"chapter [0-9ivxlc]+\.?", re.IGNORECASE)
_LENGTH_BYTES = 4  # before each compressed object


def read_novels() -> list[tuple[str, str]]:
    """Reads the asset `janeausten`.

    Returns:
      (name, text) of each chapter, such as `emma/1`, in the order of the books; 0 is what stands
      before the first.

    Raises:
      ConfigError: the asset cannot be had, or `rdata` is not installed.
    """
    rdata = need("rdata", "novels", "data 'janeausten'")

    def parse(data: bytes) -> Json:
        return rdata.conversion.convert(rdata.parser.parse_data(data, extension=".rds"))

    folder = fetch("janeausten")
    places = parse(gzip.decompress((folder / "Rdata.rdx").read_bytes()))["variables"]
    books = (folder / "Rdata.rdb").read_bytes()
    found = []
    for name, (start, size) in sorted(places.items()):
        lines = parse(zlib.decompress(books[start + _LENGTH_BYTES : start + size]))
        found += [(f"{name}/{number}", text) for number, text in enumerate(_chapters(lines))]
    return found


def _chapters(lines: Iterable[object]) -> list[str]:
    chapters: list[list[str]] = [[]]
    for line in map(str, lines):
        if _CHAPTER.fullmatch(line.strip()):
            chapters.append([])
        chapters[-1].append(line)
    return ["\n".join(part).strip() + "\n" for part in chapters]
