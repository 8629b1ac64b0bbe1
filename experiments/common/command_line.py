"""The command line of an experiment, from the fields of its settings.

`--import FILE.py`, of every script, runs a file first that registers recipes and presets, whose
names then work wherever a precision is given.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import os
import re
import sys
import traceback
from pathlib import Path
from typing import TypeVar

import tyro

from mpjax.data.cache import checksum
from mpjax.errors import ConfigError

T = TypeVar("T")
IMPORT = "--import"
_HELP = (
    f"{IMPORT} FILE.py runs a file of yours first, which registers recipes and presets; repeatable."
)
_loaded: dict[Path, str] = {}  # file -> checksum: what it registers lasts as long as the process
_asked: list[Path] = []  # by this command line


def imported() -> dict[str, str]:
    """Returns the name -> checksum of each file that is imported, for a run's settings."""
    return {path.name: _loaded[path] for path in _asked}


def import_file(path: Path) -> None:
    """Runs a Python file that registers recipes, presets and the like.

    Raises:
      ConfigError: there is none, or it raises something.
    """
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"import: {path} is no file; give a Python file, such as my_recipes.py")
    _asked.append(path)
    if path in _loaded:
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"import: {path} is no Python file; give one, such as my_recipes.py")
    module = importlib.util.module_from_spec(spec)
    if path.stem in sys.modules:  # `json.py` would stand in for a module that others import
        raise ConfigError(f"import: a module {path.stem} is loaded already; rename {path.name}")
    sys.modules[path.stem] = module
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # not into the user's folder
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__)
                 if f.filename == str(path)]  # fmt: skip
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "?")
        raise ConfigError(
            f"import: {path.name}, line {line}: {type(error).__name__}: {error}; mend the file"
        ) from None
    finally:
        sys.dont_write_bytecode = writes
    _loaded[path] = checksum(path)


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
    for file in files:
        import_file(file)
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
