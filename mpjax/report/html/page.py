"""A report of runs as one page: nothing is fetched, and all of it is there without JavaScript."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mpjax.report import runs
from mpjax.report.curves import Curve, by_step, fitting, gap_curve, loss_curve, scale_path
from mpjax.report.html.chart import curves_chart, intervals_chart, paths_chart
from mpjax.report.html.elements import MOST_ROWS, Table, swatch, table
from mpjax.report.html.run_sections import (
    audit,
    environment,
    found_in,
    heatmap,
    manifests,
    settings,
)
from mpjax.report.results import Outcome, check_outcomes, gaps, interval

# What keeps a page small and readable, whatever the runs; where it cuts, the page says so.
_POINTS = 12_000  # of all curves
_MOST_POINTS = 400  # of one
_MOST_ARMS = 48  # that are drawn
_CHANGES = 6_000  # of all loss scales
_MOST_CHANGES = 600  # of one arm's
_SLICES = 3_000  # rows of all tables of slices
_PICTURES = 600_000  # bytes of all


def html_report(
    outcomes: Sequence[Outcome], title: str, *, tables: Sequence[Table] = (),
    notes: Sequence[str] = (), unit: str = "nats/token", window: int = 20,
    out: str | Path | None = None, pictures: Sequence[Path] = (),
) -> str:  # fmt: skip
    """Returns a report as one self-contained HTML page, below 3 MB however long the runs are.

    It holds the tables, the training loss and its gap to the reference with the range of the
    seeds, paired intervals, loss scales and skipped steps, and of the runs whose folders are known
    their settings, environment, measured tensors and audit.

    Args:
      outcomes: arms; one alone is the report of a run.
      title: heading.
      tables: (title, head, rows) of the results, the first being the comparison and the others
        slices.
      notes: paragraphs below the first table.
      unit: of the loss.
      window: records of the running mean, as of `plot_loss`; more where a curve is thinned.
      out: folder in which the runs of an outcome without folders lie as `LABEL/seed0` ...
      pictures: PNG files that are put into the page.

    Raises:
      ConfigError: outcomes that make no comparison.

    Example:
      >>> run = [{"step": n, "loss": 3.0 / n} for n in range(1, 9)]
      >>> page = html_report([Outcome.from_records("mine", run)], "<A run>")
      >>> "&lt;A run&gt;" in page, "<A run>" in page
      (True, False)
    """
    by_label = check_outcomes(outcomes)
    inside = runs.folders_in(Path(out), list(by_label)) if out else {}
    where = {o.label: o.folders or inside.get(o.label, ()) for o in outcomes}
    pages, problems = manifests(where)
    drawn = outcomes[:_MOST_ARMS]
    data: dict[str, Any] = {"arms": [o.label for o in drawn]}
    sections = [
        ("results", "Results", _results(outcomes, tables[:1], notes)),
        ("gaps", "Gaps", _gaps(drawn, by_label)),
        ("curves", "Curves", _curves(drawn, len(outcomes), by_label, unit, window, data)),
        ("scale", "Loss scale and skipped steps", _scales(drawn, data)),
        ("slices", "Tables", _slices(tables[1:])),
        ("formats", "What each format would lose", found_in(where, heatmap, problems)),
        ("audit", "Audit", found_in(where, audit, problems)),
        ("figures", "Figures", _pictures(pictures)),
        ("settings", "Settings", settings(pages)),
        ("environment", "Environment", environment(pages)),
    ]
    if problems:
        lines = "".join(f"<li>{escape(line)}</li>" for line in problems)
        sections.append(("problems", "Files that could not be read", f"<ul>{lines}</ul>"))
    sections = [section for section in sections if section[2]]
    links = "".join(f'<li><a href="#{name}">{head}</a></li>' for name, head, _ in sections)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-head"><h2 id="{name}-head">{head}</h2>'
        f"{content}</section>"
        for name, head, content in sections
    )
    return _document(title, _lead(outcomes), links, body, data)


def _document(title: str, lead: str, links: str, body: str, data: Mapping[str, Any]) -> str:
    """The page; its policy forbids every request and every script but its own."""
    css, script = (
        resources.files("mpjax.report.html").joinpath(name).read_text("utf-8")
        for name in ("page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
        f" script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    # A </script> in the data would end it; as escapes these are the same JSON.
    values = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        values = values.replace(character, f"\\u{ord(character):04x}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
        f"<style>\n{css}</style>\n</head>\n<body>\n"
        f'<a class="skip" href="#results">Skip to the results</a>\n'
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header>\n<main>\n{body}\n</main>\n'
        "<footer>Written by mpjax. The page holds all of its data and fetches nothing.</footer>\n"
        f'<script type="application/json" id="data">{values}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _lead(outcomes: Sequence[Outcome]) -> str:
    """What was run, in a line."""
    seeds = {len(o.records) for o in outcomes}
    steps = {int(run[-1]["step"]) for o in outcomes for run in o.records if run}
    parts = [_count(len(outcomes), "arm")] if len(outcomes) > 1 else []
    parts.append(_range(seeds, "seed") + " each" * (len(outcomes) > 1))
    return ", ".join([*parts, *([_range(steps, "step")] if steps else [])])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _range(numbers: set[int], noun: str) -> str:
    low, high = min(numbers), max(numbers)
    return _count(high, noun) if low == high else f"{low:,} to {_count(high, noun)}"


def _results(outcomes: Sequence[Outcome], tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Numbers of a run as tiles, or the table of a comparison; then the notes."""
    content = _tiles(outcomes[0]) if len(outcomes) == 1 else ""
    content += "".join(map(table, tables))
    return content + "".join(f"<p class=note>{escape(note)}</p>" for note in notes)


def _tiles(outcome: Outcome) -> str:
    """The numbers of a single arm."""
    last = [run[-1] for run in outcome.records]
    first = outcome.records[0][0]
    trained = "training loss, last 20"
    measured = {trained}  # a NaN of these is one, of others it is no number
    if len(by_step(outcome, "validation_loss")[0]):
        measured.add("validation loss")
    values = {
        "validation loss": interval(outcome.validation_loss),
        trained: interval([np.mean([r["loss"] for r in run[-20:]]) for run in outcome.records]),
        "tokens/s": (outcome.tokens_per_s, math.nan),
        "bytes/parameter": (outcome.bytes_per_parameter, math.nan),
        "steps": (last[0]["step"], math.nan),
        "skipped steps": (float(np.mean(outcome.skipped)), math.nan),
        "final loss scale": (float(np.mean(outcome.loss_scale)), math.nan),
    }
    for name in last[0]:  # what only the end has are scores
        if name not in first and name != "validation_loss":
            found = [record.get(name) for record in last]
            if all(isinstance(value, int | float) for value in found):
                values[name] = interval(found)  # type: ignore[arg-type]
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{_number(mean)}"
        f"{f'<small> ± {_number(half)}</small>' if math.isfinite(half) else ''}</dd></div>"
        for name, (mean, half) in values.items()
        if name in measured or not math.isnan(mean)
    )
    return f"<dl class=tiles>{shown}</dl>"


def _number(value: float) -> str:
    if math.isfinite(value) and (value == round(value) or abs(value) >= 1000):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _slices(tables: Sequence[Table]) -> str:
    """The tables of slices, each with as many rows as all of them leave it."""
    most = max(20, min(MOST_ROWS, _SLICES // max(1, len(tables))))
    shown = tables[: _SLICES // most]
    more = len(tables) - len(shown)
    said = f"<p class=note>{_count(more, 'more table')} of slices is left out.</p>" * (more > 0)
    return "".join(table(one, most) for one in shown) + said


def _gaps(outcomes: Sequence[Outcome], by_label: Mapping[str, Outcome]) -> str:
    """The gap of each arm to its reference, with its paired interval."""
    rows = []
    for number, o in enumerate(outcomes):
        if o.reference == o.label:
            continue
        each = gaps(o.validation_loss, by_label[o.reference].validation_loss)
        mean, half = interval(each)
        if math.isfinite(mean):
            rows.append((number, o.label, o.reference, mean, half, each))
    if not rows:
        return ""
    return (
        f"<figure><div class=chart>{intervals_chart(rows)}</div><figcaption>Gap of the validation"
        " loss to the reference in percent, lower is better: the mean over paired seeds (same"
        " initial weights, same batches), its 95 % confidence interval (Student's t), and each seed"
        " as a ring. An interval that holds zero shows no difference.</figcaption></figure>"
    )


def _curves(
    outcomes: Sequence[Outcome], all_arms: int, by_label: Mapping[str, Outcome], unit: str,
    window: int, data: dict[str, Any],
) -> str:  # fmt: skip
    """Training loss and gap, thinned where there are many steps."""
    records = max(len(run) for o in outcomes for run in o.records)
    most = max(40, min(_MOST_POINTS, _POINTS // (2 * len(outcomes))))
    stride = max(1, -(-records // most))
    window = max(fitting(outcomes, window), stride)  # so that every record is in some point
    loss = [(i, loss_curve(o, window).thinned(stride)) for i, o in enumerate(outcomes)]
    gap = [
        (i, gap_curve(o, by_label[o.reference], window).thinned(stride))
        for i, o in enumerate(outcomes)
        if o.reference != o.label
    ]
    judged: list[tuple[int, np.ndarray, np.ndarray]] = []
    for i, o in enumerate(outcomes):
        steps, values = by_step(o, "validation_loss")
        if len(steps) > 1:  # a single one is in the table
            fine = slice((len(steps) - 1) % (every := -(-len(steps) // most)), None, every)
            judged.append((i, steps[fine], values.mean(0)[fine]))
    said = (
        f"Each point is the plain mean of {_count(window, 'record')}, at the middle of its steps."
    )
    if any(curve.seeds > 1 for _, curve in loss):
        said += " Curves are means of the seeds; a band reaches from the least to the greatest."
    if stride > 1:
        said += f" {len(loss[0][1].steps):,} of {records:,} points are drawn."
    if judged:
        said += " Dots are the validation loss."
    if all_arms > len(outcomes):
        said += f" The first {len(outcomes)} of {all_arms} arms are drawn."
    charts = [("loss", f"training loss ({unit})", loss, judged, False)]
    if gap:
        charts.append(("gap", "gap to the reference (%)", gap, [], True))
    figures = []
    for name, label, curves, points, zero in charts:
        data[name] = [_plain(number, curve) for number, curve in curves]
        drawing = curves_chart(name, curves, label, points, zero)
        figures.append(
            f"<figure><h3>{escape(label)} by step</h3><div class=chart>{drawing}</div></figure>"
        )
    names = enumerate(data["arms"])
    legend = "".join(
        f'<li><button type=button data-arm="{i}" aria-pressed=true disabled>'
        f"{swatch(i)}{escape(label)}</button></li>"
        for i, label in names
    )
    shown = f"<ul class=legend>{legend}</ul>" if all_arms > 1 else ""
    return f"{shown}{''.join(figures)}<p class=note>{said}</p>"


def _plain(number: int, curve: Curve) -> dict[str, Any]:
    """A curve for the page's script, five digits a number."""
    names = ("steps", "mean", "low", "high") if curve.seeds > 1 else ("steps", "mean")

    def rounded(values: np.ndarray) -> list[float | None]:
        return [float(f"{v:.5g}") if math.isfinite(v) else None for v in values]

    arrays = {name: rounded(getattr(curve, name)) for name in names}
    arrays["steps"] = [None if math.isnan(step) else round(step, 1) for step in curve.steps]
    return {"arm": number, **arrays}


def _scales(outcomes: Sequence[Outcome], data: dict[str, Any]) -> str:
    """The path of each dynamic loss scale, and which steps were skipped."""
    figures: list[str] = []
    rows: list[tuple[str, ...]] = []
    cut = False
    for i, o in enumerate(outcomes):
        paths = [scale_path(run) for run in o.records]
        skips = [[step for step, _, skipped in path if skipped] for path in paths]
        moves = any(len({scale for _, scale, _ in path}) > 1 for path in paths)
        if moves:
            most = min(_MOST_CHANGES, _CHANGES // len(outcomes))
            every = max(1, -(-sum(map(len, paths)) // most))
            cut |= every > 1
            thin = [path[:-1:every] + path[-1:] for path in paths]
            drawing = paths_chart(f"scale{i}", list(enumerate(thin)))
            legend = "".join(f"<li>{swatch(s)}seed {s}</li>" for s in range(len(paths)))
            figures.append(
                f"<figure><h3>{escape(o.label)}</h3><ul class=legend>{legend}</ul>"
                f"<div class=chart>{drawing}</div></figure>"
            )
            # The stairs between two changes are level, so the script needs no other steps.
            data[f"scale{i}"] = [
                {"name": f"seed {s}", "steps": [p[0] for p in path], "mean": [p[1] for p in path]}
                for s, path in enumerate(thin)
            ]
        for seed, (path, found) in enumerate(zip(paths, skips, strict=True)):
            if found or moves:
                shown = ", ".join(map(str, found[:12]))
                more = f" and {len(found) - 12} more" if len(found) > 12 else ""
                scales = [scale for _, scale, _ in path]
                rows.append((
                    o.label, str(seed), str(o.skipped[seed]), f"{shown}{more}" or "none",
                    *map(_scale, (min(scales), max(scales), scales[-1])),
                ))  # fmt: skip
    if not rows:
        return ""
    head = ("arm", "seed", "skipped", "at steps", "least scale", "greatest", "final")
    note = "A cross is a skipped step, which changes nothing but the scale."
    note += " Changes are thinned." if cut else ""
    drawn = f"<div class=panels>{''.join(figures)}</div>"
    return f"{drawn}{table(('Skipped steps', head, rows))}<p class=note>{note}</p>"


def _scale(value: float) -> str:
    power = math.log2(value) if value > 0 else math.nan
    return f"2^{power:.0f}" if power.is_integer() else f"{value:g}"


def _pictures(paths: Sequence[Path]) -> str:
    """Pictures, as long as they fit."""
    parts, room = [], _PICTURES
    for path in paths:
        name, content = escape(path.stem.replace("_", " ")), path.read_bytes()
        if (room := room - len(content)) < 0:
            parts.append(f"<p class=note>{escape(path.name)} is too large for this page.</p>")
            continue
        source = base64.b64encode(content).decode()
        parts.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{source}">'
            f"<figcaption>{name}</figcaption></figure>"
        )
    return "".join(parts)
