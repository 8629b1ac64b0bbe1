"""Every Python block of the README and of the pages in docs runs as it is pasted.

A block of the README stands alone. The blocks of a page in docs are pasted one after the other, as
the cells of a notebook. They run as a user runs them: in a process of its own, without the settings
of the tests, in an empty folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("", "guides", "how")  # of docs; the others are written by programs
PAGES = [
    ROOT / "README.md",
    *(page for folder in FOLDERS for page in sorted((ROOT / "docs" / folder).glob("*.md"))),
]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
RUN = """
import json, sys
page, alone, blocks = json.load(sys.stdin)
names = {}
for line, code in blocks:
    names = {} if alone else names
    # the block's own lines in a traceback
    exec(compile("\\n" * line + code, page, "exec"), names)
    print("ran", line)
"""

pytestmark = pytest.mark.notebook


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line before each Python block, and its code."""
    text = page.read_text()
    return [(text[: found.start(1)].count("\n"), found[1]) for found in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.name)
def test_blocks_run_as_pasted(page: Path, tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_NUMPY")}
    found = blocks(page)
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps([str(page), page.name == "README.md", found]),
        capture_output=True, text=True, cwd=tmp_path, env=env | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ran ") >= len(found)


def test_all_python_is_in_a_block_that_is_run() -> None:
    """A fence of another spelling (`py`, indented) would not be run."""
    for page in PAGES:
        fences = re.findall(r"^ *```+ *(\w+)", page.read_text(), re.MULTILINE)
        assert set(fences) <= {"python", "sh"}, f"{page.name}: {set(fences)}"
        assert fences.count("python") == len(blocks(page))
    assert sum(len(blocks(page)) for page in PAGES) > 12
