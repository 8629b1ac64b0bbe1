"""Several trainings as one plan: pre-train, continue, fine-tune, distil, prune, quantise.

A plan file says of each stage its data, objective, Precision, optimizer, steps and what it takes
over from an earlier one. A kill anywhere goes on in the right stage, with the same bits.

Run:       python experiments/stages.py --plan experiments/plans/bert.toml
           python experiments/stages.py --plan experiments/plans/decoder.toml --out runs/decoder
Resume:    the same command. Stages that were added behind the others are trained then.
Export:    --export FOLDER writes the last stage, or --stage NAME, as transformers loads it.
Output:    report.md and report.html, results.*, loss.png, plan.json and a folder for each stage in
           --out: its checkpoints, metrics.jsonl, tensorboard/ and done.json, its scores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path

from common import launch  # sets XLA flags before JAX starts
from common.stage_build import Part, parts_of
from common.stage_plan import read_plan
from common.tables import terminal, write_page
from mpjax.errors import ConfigError
from mpjax.files import write_text
from mpjax.formats.checks import did_you_mean
from mpjax.markdown import table
from mpjax.models import stored_bytes
from mpjax.models.hf import check_export
from mpjax.report import Outcome, plot_loss, save_plot
from mpjax.train import Interrupt, ProgressBar, read_metrics
from mpjax.train.report import METRICS
from mpjax.train.stages import Finished, run_stages
from mpjax.typing import Settings

HEAD = (
    "stage", "kind", "takes", "precision", "steps", "weights, MB", "held-out loss", "other scores",
    "skipped",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Run a plan of several stages, or go on with it."""

    plan: Path
    """Plan file, such as experiments/plans/bert.toml."""
    save_every: int = 100
    """Steps between checkpoints; each stage saves at its end."""
    keep: int = 2
    """Newest checkpoints of a stage to keep."""
    export: str = ""
    """Folder, new or empty, that a stage is written to at the end, for transformers."""
    stage: str = ""
    """Which stage is exported; the last one by default."""
    out: Path = Path("runs/stages")
    """Folder of the run."""


def rows(parts: list[Part], ended: dict[str, Finished]) -> list[tuple[str, ...]]:
    """A line of the report for each stage that has ended."""
    found: list[tuple[str, ...]] = []
    for part in parts[: len(ended)]:
        stage, done = part.stage, ended[part.stage.name]
        take = f"{getattr(stage, 'take', '') or 'weights'} of {stage.source}"
        if part.source is None:
            take = "nothing"
        last = [r for r in read_metrics(done.folder / METRICS) if "skipped" in r][-1:]
        scores = dict(done.scores)
        loss = scores.pop("validation_loss")
        found.append((
            stage.name, stage.kind, take, getattr(stage, "precision", "–") if part.trains else "–",
            str(done.steps), f"{stored_bytes(done.weights()) / 1e6:.2f}", f"{loss:.4f}",
            ", ".join(f"{name} {value:.4g}" for name, value in scores.items()) or "–",
            str(last[0]["skipped"]) if last else "–",
        ))  # fmt: skip
    return found


def curve(part: Part, done: Finished) -> Outcome:
    """The losses of a stage, for the plot."""
    records = [r for r in read_metrics(done.folder / METRICS) if "loss" in r]
    speeds = sorted(r["tokens_per_s"] for r in records)
    last = records[-1]
    return Outcome(
        part.stage.name, part.stage.name, (done.scores["validation_loss"],),
        speeds[len(speeds) // 2], math.nan, (last["skipped"],), (last["loss_scale"],), (records,),
    )  # fmt: skip


def write_report(config: Config, parts: list[Part], ended: dict[str, Finished], note: str) -> None:
    """Prints the table, and writes report.md, report.html, results.* and loss.png."""
    title, lines = f"{config.plan.stem}: a plan of {len(parts)} stages", rows(parts, ended)
    launch.wide().print(terminal(title, HEAD, lines, "left"))
    pages = [f"# {title}", table(HEAD, lines), note]
    for name, done in ended.items():
        if done.taken is not None:
            pages.append(f"## What {name} takes over\n\n{done.taken}")
    trained = [part for part in parts if part.trains]
    if trained:
        pages.append("![loss](loss.png)")
        curves = [curve(part, ended[part.stage.name]) for part in trained]
        save_plot(plot_loss(curves, unit="nats"), config.out / "loss.png")
        write_page(config.out, curves, [(title, HEAD, lines)], [note], "nats")
    write_text(config.out / "report.md", "\n\n".join(pages) + "\n")
    results = {
        name: done.scores | {"taken": done.taken and done.taken.rows()}
        for name, done in ended.items()
    }
    write_text(config.out / "results.json", json.dumps(results, indent=1) + "\n")


def exported(config: Config, parts: list[Part]) -> Part | None:
    """The stage that is to be exported, which is checked before anything is trained."""
    if not config.export:
        if config.stage:
            raise ConfigError(f"stage: {config.stage!r} is to be exported; give --export FOLDER")
        return None
    names = [part.stage.name for part in parts]
    if config.stage and config.stage not in names:
        raise ConfigError(
            f"stage: {config.stage!r} is no stage of {config.plan};"
            f" {did_you_mean(config.stage, names)}stages: {' '.join(names)}"
        )
    part = parts[names.index(config.stage) if config.stage else -1]
    check_export(config.export, part.model(part.plan.eval_precision).config)
    return part


def main(config: Config) -> None:
    """Runs the plan and writes its report."""
    launch.positive(config, "save_every", "keep")
    begun = time.perf_counter()
    parts = parts_of(read_plan(config.plan))
    chosen = exported(config, parts)
    steps = {part.stage.name: getattr(part.stage, "steps", 0) for part in parts}
    stages = [part.as_stage() for part in parts]
    console = launch.wide()
    with contextlib.ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        bars = stack.enter_context(contextlib.ExitStack())
        shown: dict[str, ProgressBar] = {}

        def report(name: str, record: Settings) -> None:
            if name not in shown:
                bars.close()
                bar = ProgressBar(steps[name], record["step"] - 1, label=name, lines=4)
                shown[name] = bars.enter_context(bar)
            shown[name].update(record)

        ended = run_stages(
            stages, config.out, save_every=config.save_every, keep=config.keep, report=report,
            stop=lambda: interrupt.requested,
        )  # fmt: skip
        if len(ended) < len(stages):
            console.print(f"stopped by {interrupt.requested}; the same command goes on")
            return
    note = (
        f"Judged in {parts[0].plan.eval_precision}, seed {parts[0].plan.seed}. This call took"
        f" {time.perf_counter() - begun:.0f} s on {launch.machine()}."
    )
    write_report(config, parts, ended, note)
    console.print(f"report: {config.out / 'report.md'}", highlight=False)
    if chosen is not None:
        chosen.as_run(ended[chosen.stage.name]).export(config.export)
        console.print(f"exported: {config.export}", highlight=False)


if __name__ == "__main__":
    launch.command(main, Config)
