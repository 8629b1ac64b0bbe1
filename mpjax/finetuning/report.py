"""The report of a run: what was read, its judgements, its curve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpjax.files import write_text
from mpjax.finetuning.finetuning_settings import Finetuning
from mpjax.finetuning.run_folder import RunPage, best_weights
from mpjax.markdown import table
from mpjax.report import Outcome, html_report, plot_loss, save_plot
from mpjax.train import read_metrics
from mpjax.train.report import METRICS

_UNITS = {
    "classify": "nats/text", "pair": "nats/text", "tag": "nats/word", "regress": "squared error",
}  # fmt: skip


def _shown(value: Any) -> str:
    number = isinstance(value, float) and math.isfinite(value)
    return f"{value:.4g}" if number else str(value)


def write_report_of(folder: Path) -> Path:
    """Writes report.md, loss.png and report.html of a run that has been judged; returns the first.

    Raises:
      ConfigError: no run there, or one without records.
    """
    page = RunPage.read(folder)
    _, best, scores = best_weights(folder)
    judged = [r for r in read_metrics(folder / METRICS) if "validation_loss" in r]
    names = [name.replace(" ", "_") for name in scores if name != "loss"]
    head = ("step", "loss", *(name.replace("_", " ") for name in names))
    rows = [
        (
            f"{record['step']}" + (", the best" if record["step"] == best else ""),
            *(_shown(record.get(name, "–")) for name in ("validation_loss", *names)),
        )
        for record in judged
    ]
    default = Finetuning().to_dict()
    changed = [(n, _shown(x)) for n, x in page.settings.items() if x != default[n]]
    title = f"{page.settings['task']}: {page.data}"
    parts: list[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = [
        ("Judged on held-out data", head, rows),
        ("What was read", ("what", "how much"), [(a, b) for a, b in page.lines]),
        ("Settings that are not the defaults", ("setting", "value"), changed),
    ]
    notes = [
        f"The best weights are those of step {best} of {page.steps}; judged in"
        f" {page.settings['eval_precision']}."
    ]
    outcome = Outcome.from_run(folder)
    unit = _UNITS.get(page.settings["task"], "nats/token")
    save_plot(plot_loss([outcome], unit=unit), folder / "loss.png")
    write_text(
        folder / "report.html",
        html_report([dataclasses.replace(outcome, folders=(folder,))], title, tables=parts,
                    notes=notes, unit=unit),
    )  # fmt: skip
    text = [f"# {title}", *notes]
    for name, columns, cells in parts:
        text += [f"## {name}", table(columns, cells)]
    write_text(folder / "report.md", "\n\n".join([*text, "![loss](loss.png)"]) + "\n")
    return folder / "report.md"
