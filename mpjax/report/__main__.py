"""Makes one page of finished runs: `python -m mpjax.report runs/a [runs/b ...] --out report.html`.

A folder is that of a run (`metrics.jsonl`), of an arm (`seed0`, `seed1` ...) or of a comparison. Of
several arms the others are compared with the first, seed paired with seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mpjax.errors import ConfigError
from mpjax.files import write_text
from mpjax.report.report import page_of_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and prints its path; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mpjax.report", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folders", metavar="DIR", nargs="+", help="folder of a run or of runs")
    parser.add_argument("--out", metavar="FILE", default="report.html", help="default: report.html")
    parser.add_argument("--title", default="", help="heading; by default the name of the run")
    parser.add_argument("--reference", metavar="LABEL", default="", help="default: the first arm")
    parser.add_argument(
        "--window", metavar="N", type=int, default=20, help="records of a mean; default: 20"
    )
    options = parser.parse_args(arguments)
    try:
        if options.window < 1:
            raise ConfigError(f"window: {options.window} records make no mean; give at least 1")
        out = Path(options.out)
        if out.is_dir():
            raise ConfigError(f"out: {out} is a folder; name a file, such as {out / 'report.html'}")
        page = page_of_runs(
            options.folders, options.title, reference=options.reference, window=options.window
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, page)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
