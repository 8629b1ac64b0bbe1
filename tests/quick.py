"""Which tests a change needs: those of the modules that differ from the last commit.

Run:       python tests/quick.py      (make quick gives what it prints to pytest)
Expected:  paths of tests and of modules with examples; the rules of imports always.

A module `mpjax/a/b.py` has its tests in `tests/a/test_b*.py` or, without such a file, in `tests/a`
as a whole. Where nothing differs, the last commit itself is what is looked at.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ALWAYS = ("tests/test_layers.py", "tests/test_lazy.py")
MOST = 8  # files of tests; more is no quick look, and `make test` is there


def changed() -> list[str]:
    """Files that differ from the last commit, or that it changed."""
    for against in ("HEAD", "HEAD~1"):
        command = ["git", "diff", "--name-only", "--diff-filter=d", against]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if found := done.stdout.split():
            return found
    return []


def tests_of(path: str) -> list[str]:
    """The tests of a file, the nearest first."""
    file = Path(path)
    if file.parts[0] == "tests":
        return [path] if file.name.startswith("test_") else []
    if file.parts[0] != "mpjax" or file.suffix != ".py":
        return []
    folder = ROOT / "tests" / Path(*file.parts[1:-1])
    own = sorted(folder.glob(f"test_{file.stem}*.py"))
    while not own and folder != ROOT / "tests":
        own, folder = sorted(folder.glob("test_*.py")), folder.parent
    return [path, *(each.relative_to(ROOT).as_posix() for each in own)]


def main() -> None:
    """Prints them."""
    found = dict.fromkeys(each for path in changed() for each in tests_of(path))
    print(*[*ALWAYS, *list(found)[:MOST]])


if __name__ == "__main__":
    main()
