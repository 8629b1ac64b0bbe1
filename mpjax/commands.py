"""What the commands of the package share: files of the user's that run first, one-line errors."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from mpjax.data.cache import checksum
from mpjax.errors import ConfigError

IMPORT = "--import"
_loaded: dict[Path, str] = {}  # file -> checksum: what it registers lasts as long as the process


def import_file(path: Path) -> str:
    """Runs a Python file that registers recipes, presets and the like, once; returns its checksum.

    Raises:
      ConfigError: there is none, or it raises something.
    """
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"import: {path} is no file; give a Python file, such as my_recipes.py")
    if path in _loaded:
        return _loaded[path]
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
    return _loaded[path]


def run_command(
    parser: argparse.ArgumentParser,
    act: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs a command on a run's folder; what the user can mend is one line.

    Args:
      parser: of its arguments, to which `--import FILE.py` is added: a run whose Precision is the
        user's own needs the file again.
      act: what it does with them.
      arguments: by default those of the process.

    Returns:
      The exit status: 0, or 2 after a ConfigError.
    """
    parser.add_argument(
        IMPORT, action="append", default=[], dest="imports", metavar="FILE.py",
        help="registers recipes and presets of your own, as in training; repeatable",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        for file in options.imports:
            import_file(Path(file))
        act(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
