"""The command line of an experiment, from the fields of its settings.

`--import FILE.py`, of every script, runs a file first that registers recipes and presets, whose
names then work wherever a precision is given.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
from pathlib import Path
from typing import TypeVar

import tyro

from mpjax.commands import IMPORT, import_file
from mpjax.errors import ConfigError

T = TypeVar("T")
_HELP = (
    f"{IMPORT} FILE.py runs a file of yours first, which registers recipes and presets; repeatable."
)
_asked: dict[str, str] = {}  # name -> checksum of the files of this command line
_files: list[str] = []  # the files, for another process


def imported() -> dict[str, str]:
    """Returns the name -> checksum of each file that is imported, for a run's settings."""
    return dict(_asked)


def imported_files() -> list[str]:
    """Returns the files that are imported, for a process that is to import them too."""
    return list(_files)


def _without_imports(words: list[str]) -> tuple[list[str], list[Path]]:
    """A command line without its `--import FILE` or `--import=FILE`, and the files."""
    rest, files, words = [], [], list(words)
    while words:
        word = words.pop(0)
        if word.startswith(f"{IMPORT}="):
            files.append(Path(word.partition("=")[2]))
        elif word != IMPORT:
            rest.append(word)
        elif words:
            files.append(Path(words.pop(0)))
        else:
            raise ConfigError(f"{IMPORT}: no file; write {IMPORT} my_recipes.py")
    return rest, files


def parse(config: type[T]) -> T:
    """Returns the settings of the command line; a mistake in it is one line, status 2.

    Raises:
      ConfigError: a name or text is not UTF-8, or a file to import is missing or fails.
    """
    for flag, word in itertools.pairwise(["", *sys.argv[1:]]):
        if (content := os.fsencode(word)).decode(errors="replace") != word:
            where = flag if flag.startswith("--") else "command line"
            raise ConfigError(f"{where}: {content!r} is not UTF-8; rename the file, or write it so")
    words, files = _without_imports(sys.argv[1:])
    _asked.clear()
    _files[:] = [str(file.resolve()) for file in files]
    for file in files:
        _asked[file.resolve().name] = import_file(file)
    about = f"{(config.__doc__ or '').strip()}\n\n{_HELP}"
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(
                config, args=words, description=about, config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as ended:
        # tyro prints a box: a title, the error, similar flags, and help, between horizontal lines.
        lines = [line.strip(" │╭╮╰╯─") for line in shown.getvalue().splitlines()]
        blocks: list[list[str]] = [[]]
        for line in lines[1:]:
            if line.strip("-"):
                blocks[-1].append(line)
            elif blocks[-1]:
                blocks.append([])
        if ended.code:
            wrong = " ".join(blocks[0]).removesuffix(".")
            near = [line for block in blocks for line in block if re.match(r"--[\w-]+ \S+$", line)]
            see = f"see {', '.join(near)}; " if near else ""
            print(f"error: {wrong}; {see}--help lists all", file=sys.stderr)
        raise
