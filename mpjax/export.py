"""Export of a run on the command line: python -m mpjax.export RUN FOLDER."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mpjax.errors import ConfigError
from mpjax.finetuning import load_run


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the folder; what the user can mend is one line, status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m mpjax.export",
        description="Writes the best weights of a run as a folder that transformers loads.",
    )
    parser.add_argument("run", help="folder of a run: --out of experiments/finetune.py")
    parser.add_argument("folder", help="new, or empty")
    parser.add_argument("--dtype", default=None, help="of the tensors, such as bf16")
    options = parser.parse_args(arguments)
    try:
        run = load_run(options.run)
        path = run.export(options.folder, dtype=options.dtype)
        print(f"{path}: weights of step {run.step}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
