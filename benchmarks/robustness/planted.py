"""Mistakes are planted in our own readers, locks and writers; the tests must notice each.

Run:       python -m benchmarks.robustness.planted [--only TEXT ...]
Expected:  the named tests pass as they are, and one fails with each mistake: a bound, a lock or a
           comparison of hashes that is gone. About 10 seconds a mistake on a busy machine.

`planted_readers.py` lists them. They are planted one at a time in a copy of `mpjax` and `tests`, in
a temporary folder; a text that does not stand once in its file is an error: the list is to be
mended. Each run of pytest is a fork of this process, which has imported JAX and imports no mpjax.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parents[2] / ".cache" / "jax-tests")
)
os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen  # noqa: F401  (for the forks)
import jax  # noqa: F401

from benchmarks.common.page import ROOT, write
from benchmarks.robustness.planted_readers import PLANTED, Planted
from mpjax.markdown import table

COPIED = ("mpjax", "tests", "benchmarks", "experiments", "pyproject.toml", "constraints.txt")
LONGEST = 600  # seconds of one run of pytest: a test that hangs is no test that fails


def passes(copy: Path, file: str, names: str) -> bool:
    """Whether tests pass; stops at the first that does not.

    Args:
      copy: the folder.
      file: of tests.
      names: an expression of pytest, empty for all.

    Raises:
      RuntimeError: pytest ran none of them, or did not end.
    """
    command = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        f"tests/{file}",
        *(["-k", names] * bool(names)),
    ]
    said = copy / "said.txt"
    child = os.fork()
    if not child:
        os.environ["PYTHONPATH"] = str(copy)  # of what tests start
        os.chdir(copy)
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        import pytest

        os._exit(int(pytest.main(command)))
    end = time.monotonic() + LONGEST
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise RuntimeError(f"{file}: {names}: not done after {LONGEST} s")
        time.sleep(0.1)
    code = os.waitstatus_to_exitcode(done[1])
    if code > 1:  # below 0: a signal, as where memory is out in Rust
        raise RuntimeError(f"{file}: {names}: pytest's code {code}: {said.read_text()[-500:]!r}")
    return code == 0


def noticed(copy: Path, one: Planted) -> bool:
    """Whether its tests notice a mistake.

    Raises:
      RuntimeError: its text does not stand once in its file.
    """
    path = copy / "mpjax" / one.file
    whole = path.read_text()
    if (count := whole.count(one.old)) != 1:
        raise RuntimeError(f"mpjax/{one.file}: {one.old!r} stands there {count} times; mend it")
    path.write_text(whole.replace(one.old, one.new))
    try:
        return not passes(copy, one.tests.partition("::")[0], one.tests.partition("::")[2])
    finally:
        path.write_text(whole)


def without(copy: Path, chosen: list[tuple[str, Planted]]) -> dict[str, bool]:
    """File of tests -> whether all tests that are named in it pass as the package is."""
    names: dict[str, set[str]] = {}
    for _, one in chosen:
        file, _, name = one.tests.partition("::")
        names.setdefault(file, set()).add(f"({name})" if name else "")
    return {
        file: passes(copy, file, "" if "" in some else " or ".join(sorted(some)))
        for file, some in names.items()
    }


def main() -> int:
    """Plants all and writes the page; whether each was noticed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", help="those whose words or file hold such a text")
    only = parser.parse_args().only
    chosen = [
        (area, one)
        for area, some in PLANTED.items()
        for one in some
        if not only or any(text in f"{area} {one.what} {one.file}" for text in only)
    ]
    rows, problems = [], []
    with tempfile.TemporaryDirectory(prefix="mpjax-planted-") as folder:
        copy = Path(folder)
        for name in COPIED:
            if (ROOT / name).is_file():
                shutil.copy(ROOT / name, copy / name)
            else:
                left_out = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, copy / name, ignore=left_out)
        whole = without(copy, chosen)
        problems += [f"{file}: fails without a mistake" for file, good in whole.items() if not good]
        print(f"without: {sum(whole.values())} of {len(whole)} files pass", flush=True)
        for area, one in chosen:
            begun, found = time.monotonic(), False
            try:
                found = noticed(copy, one)
                if not found:
                    problems.append(f"{one.file}: {one.what}: not noticed by {one.tests}")
            except RuntimeError as error:
                problems.append(str(error))
            file = one.tests.partition("::")[0]
            says = "yes" if found and whole[file] else "**no**"
            rows.append((area, one.what, f"`{one.file}`", f"`{file}`", says))
            print(*rows[-1], f"{time.monotonic() - begun:.0f} s", flush=True)
    print(*problems, sep="\n")
    if not only:
        count = sum(row[-1] == "yes" for row in rows)
        verdict = "met" if count == len(rows) else "MISSED"
        body = (
            f"Each of {len(rows)} mistakes was planted alone in a copy of the package, and the"
            f" tests named were run with it and without; bar: all pass without, one fails with it."
            f" Noticed: {count} of {len(rows)}: {verdict}.\n\n"
            + table(("of", "what is no longer done", "in mpjax/", "in tests/", "noticed"), rows)
        )
        write("planted", "Mistakes planted in our own readers are caught by the tests", body)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
