"""Export of a run on the command line: python -m mpjax.export RUN FOLDER."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mpjax.commands import run_command
from mpjax.finetuning import load_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the folder; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mpjax.export",
        description="Writes the best weights of a run as a folder that transformers loads.",
    )
    parser.add_argument("run", help="folder of a run: --out of experiments/finetune.py")
    parser.add_argument("folder", help="new, or empty")
    parser.add_argument("--dtype", default=None, help="of the tensors, such as bf16")
    parser.add_argument(
        "--vectors", action="store_true",
        help="an encoder without its head, for sentence-transformers: the mean of the tokens",
    )  # fmt: skip
    return run_command(parser, _export, arguments)


def _export(options: argparse.Namespace) -> None:
    run = load_run(options.run)
    path = run.export(options.folder, dtype=options.dtype, vectors=options.vectors)
    print(f"{path}: weights of step {run.step}")


if __name__ == "__main__":
    sys.exit(main())
