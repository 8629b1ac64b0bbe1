"""From a file of your own to a model in use: fine-tune, keep the best, predict, export.

Run:       python experiments/finetune.py --data reviews.csv --text review --label stars \
               --model minilm --precision bf16 --out runs/a
           python experiments/finetune.py --task instruct --data talk.jsonl --model smollm2 \
               --out runs/b
           the same command with --resume goes on with a run that was stopped
Then:      python -m mpjax.predict runs/a --text 'what a fine day'
           python -m mpjax.export runs/a my-model        # transformers loads it
           python experiments/chat.py runs/b
Expected:  what was read as a table, a line of scores for each judgement, and in --out the report,
           the metrics and the best weights. A run that was stopped or killed goes on with --resume
           with the same bits.
"""

from __future__ import annotations

import dataclasses
import sys

from common import launch  # sets XLA flags before JAX starts
from common.datasets.assets import asset_names, fetch
from common.tables import terminal
from mpjax.finetuning import Finetuning, finetune
from mpjax.finetuning.work import Lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Finetuning):
    """Fine-tune a model on data of your own, and keep the best of it."""

    data: str
    """A table (.csv .tsv .jsonl .parquet or hf:NAME) with a header or keys; a file of word<TAB>tag
    lines (`tag`); documents (`lm`)."""


def main(config: Config) -> None:
    """Trains and prints what came of it."""
    shown = launch.wide()

    def show(lines: Lines) -> None:
        shown.print(terminal(f"{config.data}: what was read", ("what", "how much"), lines, "left"))

    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name != "data"
    }
    if config.model in asset_names():
        settings["model"] = str(fetch(config.model))
    try:
        run = finetune(config.data, show=show, quiet=False, **settings)
    except KeyboardInterrupt as stop:
        print(stop or "interrupted", file=sys.stderr)
        raise
    scores = ", ".join(f"{name} {value:.4g}" for name, value in run.scores.items())
    shown.print(f"best weights, of step {run.step}: {scores}", highlight=False)
    shown.print(f"report: {config.out / 'report.md'}", highlight=False)
    if config.export:
        shown.print(f"exported: {config.export}", highlight=False)


if __name__ == "__main__":
    launch.command(main, Config)
