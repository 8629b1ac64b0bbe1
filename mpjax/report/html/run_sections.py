"""What the folders of runs hold, as sections of a page: tensors, audit, settings, environment."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mpjax.errors import ConfigError
from mpjax.report import runs
from mpjax.report.heatmap import KINDS, lost_shares, signed_log
from mpjax.report.html.elements import cell, folded, table

_MOST_CELLS = 4_000  # of a heatmap
_MOST_ARMS = 2  # whose tensors and audits are shown
_MOST_POLICIES = 6  # arms whose policies are listed
_MOST_SETTINGS = 2_000  # cells of the table of those that differ
_FORMATS = ("e4m3", "e5m2", "fp16", "bf16")


def found_in(
    where: Mapping[str, Sequence[Path]], draw: Callable[[str, Sequence[Path]], str],
    problems: list[str],
) -> str:  # fmt: skip
    """Returns what the runs of the first arms that left something left, drawn.

    Args:
      where: label -> folders of its runs.
      draw: (label, folders) -> HTML, empty where they hold nothing.
      problems: to which a damaged file is added; the others are drawn.
    """
    parts: list[str] = []
    for label, folders in where.items():
        try:
            parts += filter(None, [draw(label, folders)])
        except ConfigError as error:
            problems.append(str(error))
    more = len(parts) - _MOST_ARMS
    said = f"<p class=note>The other {more} arms have such records too.</p>" if more > 0 else ""
    return "".join(parts[:_MOST_ARMS]) + said


def heatmap(label: str, folders: Sequence[Path]) -> str:
    """Returns tensors by layers, a table for each format: the numbers of `plot_heatmap`."""
    parts = []
    for step, records in runs.measured(folders):
        names = {
            k.removeprefix("underflow/") for r in records for k in r if k.startswith("underfl")
        }
        plain = sorted(name for name in names if not name.endswith(" scaled"))
        formats = [f for f in _FORMATS if f in names] or plain[:4]
        rows, columns, values = lost_shares(records, formats)
        if not rows:
            continue
        order = list(range(len(rows)))
        room = max(1, _MOST_CELLS // (len(formats) * len(columns)))
        if cut := len(order) > room:
            worst = np.nan_to_num(np.abs(values)).max((0, 2))
            order = sorted(np.argsort(-worst, kind="stable")[:room])
        for f, shares in zip(formats, values, strict=True):
            parts.append(_panel(f, [rows[i] for i in order], columns, shares[order]))
        said = (
            f"{label}, step {step}: share of each tensor's numbers, in percent, that a format would"
            " make zero (blue) or that lie beyond its largest number (red); white is at most"
            " 0.01 %, a dot no such tensor."
        )
        said += f" The {room} of {len(rows)} tensors that lose most are shown." if cut else ""
        return f"<p class=note>{escape(said)}</p><div class=panels>{''.join(parts)}</div>"
    return ""


def _panel(
    name: str, rows: Sequence[tuple[str, str]], columns: Sequence[int | None], shares: np.ndarray
) -> str:
    levels = np.round(8 * signed_log(shares))
    head = "".join(f"<th scope=col>{'—' if c is None else c}</th>" for c in columns)
    lines, group = [], ""
    for (kind, tensor), row, level in zip(rows, shares, levels, strict=True):
        if kind != group:
            group = kind
            lines.append(
                f"<tr><th colspan={len(columns) + 1} scope=rowgroup>{KINDS[kind]}</th></tr>"
            )
        cells = []
        for share, n in zip(row, level, strict=True):
            if math.isnan(share):
                cells.append("<td>·</td>")
            elif n == 0:
                cells.append("<td class=z></td>")
            else:
                percent = 100 * abs(share)
                text = f"{percent:.0f}" if percent >= 0.95 else ""
                colour, lost = ("o", "beyond the largest") if n > 0 else ("u", "would become zero")
                title = f"{percent:.2g} % {lost}"
                cells.append(f'<td class={colour}{abs(int(n))} title="{title}">{text}</td>')
        lines.append(f"<tr><th scope=row>{cell(tensor)}</th>{''.join(cells)}</tr>")
    return (
        f'<div class=scroll role=region tabindex=0 aria-label="{escape(name)}"><table class=heat>'
        f"<caption>{escape(name)}</caption><thead><tr><th scope=col>layer</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def audit(label: str, folders: Sequence[Path]) -> str:
    """Returns what a run's program was found to run: FLOPs by dtype, leaks, casts."""
    for found in runs.audits(folders):
        try:
            costs = found["by_dtype"]
            flops = max(1, sum(cost["products"] for cost in costs.values()))
            rows = [
                (dtype, f"{100 * cost['products'] / flops:.1f} %", f"{cost['products']:.3g}",
                 f"{cost['others']:.3g}", f"{cost['bytes']:.3g}")
                for dtype, cost in sorted(costs.items(), key=lambda i: -i[1]["products"])
            ]  # fmt: skip
            head = ("dtype", "share of product FLOPs", "product FLOPs", "other FLOPs", "bytes")
            parts = [table((f"{label}: FLOPs by dtype", head, rows))]
            leaks = [
                (x["line"], x["path"], x["mechanism"], x["dtype"], f"{100 * x['share']:.1f} %",
                 x["remedy"])
                for x in (*found["leaks"], *found["minor"])
            ]  # fmt: skip
            columns = ("cause at", "path", "mechanism", "dtype", "share", "remedy")
            parts += [table(("Leaks: products that run wide", columns, leaks))] if leaks else [
                "<p class=note>No leaks.</p>"
            ]  # fmt: skip
            for name in ("double_casts", "dead_casts", "low_reductions"):
                casts = [
                    (f["what"], f["path"], f["direction"], f["line"], str(f["times"]))
                    for f in found[name]
                ]
                title = name.replace("_", " ")
                head = ("what", "path", "direction", "line", "times")
                if casts:
                    parts.append(folded(f"{len(casts)} {title}", table((title, head, casts))))
            parts += [f"<p class=note>{escape(note)}</p>" for note in found["notes"]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"audit: {runs.AUDIT} of {label} is not what Audit.to_dict gives ({error!r});"
                " remove it"
            ) from None
        return "".join(parts)
    return ""


def manifests(
    where: Mapping[str, Sequence[Path]],
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Returns the manifest of each arm's first run, and what could not be read."""
    found: dict[str, Mapping[str, Any]] = {}
    problems: list[str] = []
    for label, folders in where.items():
        for folder in folders[:1]:
            try:
                if page := runs.read_manifest(folder):
                    found[label] = page
            except ConfigError as error:
                problems.append(str(error))
    return found, problems


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        parts = [_flat(v, f"{name}.{k}" if name else str(k)) for k, v in value.items()]
        return {k: v for part in parts for k, v in part.items()}
    if isinstance(value, list):
        return {name: " ".join(map(str, value)) or "none"}
    return {name: "–" if value in ("", None) else str(value)}


def _apart(pages: Mapping[str, Mapping[str, str]]) -> tuple[list[str], dict[str, str]]:
    """Names of what differs between arms, and what all of them share."""
    names = list(dict.fromkeys(name for page in pages.values() for name in page))
    differing = [n for n in names if len({page.get(n, "–") for page in pages.values()}) > 1]
    first = next(iter(pages.values()))
    return differing, {n: first.get(n, "–") for n in names if n not in differing}


def settings(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns settings: those that differ as a table of arms, those that are shared below it."""
    if not manifests:
        return ""
    pages = {
        label: {"precision": str(page.get("precision_text", "–"))}
        | {
            name: value
            for name, value in _flat(page.get("config", {})).items()
            if name not in ("precision", "out", "fresh", "seed")
        }
        for label, page in manifests.items()
    }
    differing, shared = _apart(pages)
    parts = []
    if differing:
        rows = [(label, *(page.get(n, "–") for n in differing)) for label, page in pages.items()]
        most = max(20, _MOST_SETTINGS // len(differing))
        parts.append(table(("What differs between the arms", ("arm", *differing), rows), most))
    if shared:
        whole = table(("Settings of all arms" if len(pages) > 1 else "Settings",
                        ("setting", "value"), list(shared.items())))  # fmt: skip
        parts.append(folded("Settings that all arms share", whole) if len(pages) > 1 else whole)
    policies: list[str] = []
    for label, page in manifests.items():
        rows = list(_flat(page.get("policies", {})).items())
        products = list(_flat(page.get("products", {})).items())
        if kernels := page.get("attention"):
            products.append(("attention", ", ".join(kernels)))
        tables = [table(("Policy by path", ("path", "policy"), rows))] if rows else []
        if products:
            tables.append(table(("What multiplies here", ("product", "by"), products)))
        if tables:
            policies.append(folded(f"{label}: the policy of every path", "".join(tables)))
    if more := len(policies[_MOST_POLICIES:]):
        policies[_MOST_POLICIES:] = [f"<p class=note>Those of {more} more arms are left out.</p>"]
    return "".join([*parts, *policies])


def environment(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns versions, devices and what else a number depends on."""
    if not manifests:
        return ""
    names = ("device", "processes", "commit", "versions", "xla_flags", "environment", "command",
             "started")  # fmt: skip
    pages = {
        label: _flat({name: page[name] for name in names if name in page})
        for label, page in manifests.items()
    }
    differing, shared = _apart(pages)
    rows = [
        (name, "; ".join(f"{label}: {page.get(name, '–')}" for label, page in pages.items()))
        if name in differing else (name, shared[name])
        for name in dict.fromkeys(name for page in pages.values() for name in page)
    ]  # fmt: skip
    # JAX's own switches are many, and mostly at their defaults.
    own = [row for row in rows if not row[0].startswith("environment.")]
    jax = [(k.removeprefix("environment."), v) for k, v in rows if k.startswith("environment.")]
    shown = table(("Where it ran", ("what", "value"), own))
    return shown + (
        folded("Switches of JAX and XLA", table(("Switches", ("switch", "value"), jax)))
        if jax
        else ""
    )
