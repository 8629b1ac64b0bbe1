"""The command line of an experiment, from the fields of its settings."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
from typing import TypeVar

import tyro

from mpjax.errors import ConfigError

T = TypeVar("T")


def parse(config: type[T]) -> T:
    """Returns the settings of the command line; a mistake in it is one line, status 2.

    Raises:
      ConfigError: a name or text is not UTF-8.
    """
    for flag, word in itertools.pairwise(["", *sys.argv[1:]]):
        if (content := os.fsencode(word)).decode(errors="replace") != word:
            where = flag if flag.startswith("--") else "command line"
            raise ConfigError(f"{where}: {content!r} is not UTF-8; rename the file, or write it so")
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(config, config=(tyro.conf.FlagCreatePairsOff,))
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
