"""The page of a run: tables, what is met and what is missing, from the JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common.page import ROOT
from benchmarks.on_device import chart
from benchmarks.on_device.cells import CELLS, PARTS
from benchmarks.on_device.files import write
from benchmarks.on_device.tables import TABLES, gigabytes, table

DOCS = ROOT / "docs" / "evidence"
COMMAND = "make verify-device"
NOT_MEASURED = "not measured on an accelerator"
TITLES = {
    "right": "is it right?", "fast": "how fast?", "peers": "against whom?", "tools": "the tools",
}  # fmt: skip
Cells = dict[str, dict[str, Any]]


def is_accelerator(data: dict[str, Any] | None) -> bool:
    """Whether results come from something else than a CPU, at full size."""
    if data is None or data["size"] != "full":
        return False
    return data["header"].get("platform") not in (None, "cpu")


def done(data: dict[str, Any] | None) -> Cells:
    """Returns the results of the cells that were measured, by name."""
    cells = [] if data is None else data["cells"]
    return {cell["name"]: cell["result"] for cell in cells if cell["state"] == "done"}


def is_wrong(cell: dict[str, Any]) -> bool:
    """Whether a cell of part a does not hold."""
    rows = cell.get("result", {}).get("rows", [])
    failed = cell["state"] in ("failed", "stopped")
    return bool(cell["part"] == "right" and (failed or not all(row["ok"] for row in rows)))


def line(cell: dict[str, Any]) -> str:
    """Returns what became of a cell, in one line."""
    head = f"{PARTS[cell['part']]}. {cell['name']}: {cell['state']}"
    if cell["state"] != "done":
        return f"{head}, {cell['why']}" if cell.get("why") else head
    found = cell["result"]
    if "rows" in found:
        bad = [row["name"] for row in found["rows"] if not row["ok"]]
        return f"{head}, {len(found['rows'])} checks, " + (f"WRONG: {bad}" if bad else "all hold")
    for name in ("tokens_per_s", "tflops", "time", "speed"):
        if name in found:
            many = found[name] if "median" not in found[name] else {"": found[name]}
            each = [f"{k} {v['median']:,.4g}".strip() for k, v in many.items()]
            return f"{head}, {name} " + ", ".join(each)
    return head


# --- bars -------------------------------------------------------------------------------------


def bars(data: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """Returns the issue's bars: what, the value, and met, MISSED or not measured."""
    cells = done(data) if is_accelerator(data) else {}
    bf16, fp8 = cells.get("train bf16"), cells.get("train fp8")
    torch, alone = cells.get("torch, compiled and eager"), cells.get("torch alone")
    against: tuple[float, str] | None = None
    if torch:
        against = torch["speed"]["ours / torch compiled"]["median"], "interleaved"
    elif alone and bf16:
        theirs = alone["tokens_per_s"]["torch compiled"]["median"]
        against = bf16["tokens_per_s"]["median"] / theirs, "each in its own process"
    rows: list[tuple[str, float | None, float, bool, str]] = [
        ("bf16, tokens/s over compiled torch's", against and against[0], 1.0, True,
         against[1] if against else ""),
        ("bf16, MFU", bf16["mfu"] if bf16 else None, 0.45, True, ""),
        ("fp8, tokens/s over our bf16's", None, 1.2, True, ""),
        ("fp8, peak memory over our bf16's", None, 1.0, False, ""),
    ]  # fmt: skip
    if bf16 and fp8:
        fast = fp8["tokens_per_s"]["median"] / bf16["tokens_per_s"]["median"]
        rows[2] = (*rows[2][:1], fast, *rows[2][2:])
        if bf16["peak_bytes"] and fp8["peak_bytes"]:
            rows[3] = (*rows[3][:1], fp8["peak_bytes"] / bf16["peak_bytes"], *rows[3][2:])
    found = []
    for name, value, bar, least, note in rows:
        label = f"{name}: {'at least' if least else 'at most'} {bar:g}"
        if value is None:
            found.append((label, "", "not measured"))
        else:
            met = value >= bar if least else value <= bar
            shown = f"{value:.3f}" + (f" ({note})" if note else "")
            found.append((label, shown, "met" if met else "MISSED"))
    return found


def clocks_of(cell: dict[str, Any]) -> str:
    """Returns the clocks right behind a cell."""
    found = cell.get("clocks") or {}
    return f"{found['clocks.sm']}, {found['power.draw']}" if found else ""


def head(data: dict[str, Any]) -> str:
    """On what it was measured."""
    h = data["header"]
    versions = ", ".join(f"{name} {version}" for name, version in h["versions"].items())
    clocks = ", ".join(f"{name} {value}" for name, value in h["clocks"].items())
    memory = "" if h.get("memory") is None else f", {gigabytes(h['memory'])} GB for XLA"
    lines = [
        f"- date: {h['date']}; commit: {h['commit']}; command: `{h['command']}`, size"
        f" {data['size']}",
        f"- device: {h.get('device', 'unknown')} ({h.get('platform', 'unknown')}){memory}; host:"
        f" {h['host']}",
        f"- runtime: {h.get('runtime', 'unknown')}",
        f"- at the start: {clocks or 'clocks and driver unknown (no nvidia-smi)'}",
        f"- Python {h['python']}, {versions}",
    ]
    if "problem" in h:
        lines.append(f"- **{h['problem']}**")
    return "\n".join(lines)


def text(data: dict[str, Any] | None) -> str:
    """Returns the page of results, or of none."""
    measured = is_accelerator(data)
    if data is None:
        title = "mpjax on an accelerator"
    elif measured:
        title = f"mpjax on {data['header']['device']}"
    else:
        title = f"mpjax on this script's device: {data['header'].get('platform', 'none')}"
    parts = [f"# {title}", f"Written by `{COMMAND}` (`benchmarks/device.py`); do not edit."]
    if data is not None:
        parts.append(head(data))
    if not measured:
        parts.append(f"**{NOT_MEASURED[0].upper()}{NOT_MEASURED[1:]}.** No speed is claimed.")
    parts.append(table(("bar", "value", ""), bars(data)))
    if data is None:
        rows: list[tuple[object, ...]] = [(PARTS[c.part], c.name, f"{c.full:.0f}") for c in CELLS]
        parts += [
            f"What `{COMMAND}` measures, in this order, with the seconds that each is expected to"
            " take (judged from the work):",
            table(("part", "what", "s"), rows),
        ]
        return "\n\n".join(parts) + "\n"
    for part, letter in PARTS.items():
        cells = [c for c in data["cells"] if c["part"] == part and c["state"] == "done"]
        if cells:
            parts += [f"## {letter}: {TITLES[part]}", TABLES[part](cells)]
    missing = [c for c in data["cells"] if c["state"] != "done"]
    if missing:
        rows = [(PARTS[c["part"]], c["name"], c["state"], c.get("why", "")) for c in missing]
        parts += ["## Missing", table(("part", "what", "", "why"), rows)]
    hot = [(c["name"], clocks_of(c)) for c in data["cells"] if clocks_of(c)]
    if hot:
        parts += ["## Clocks right behind each", table(("what", "SM clock, power"), hot)]
    return "\n\n".join(parts) + "\n"


def publish(data: dict[str, Any] | None, out: Path | None, *, docs: bool = True) -> str:
    """Writes the page and its chart: into docs where it is an accelerator's, and into `out`.

    Args:
      data: the results; None is a page that says that there are none.
      out: a folder, or None.
      docs: whether results of an accelerator go to docs.

    Returns:
      Where they are.

    Raises:
      SystemExit: results of a CPU and no folder to write into: docs are not for these.
    """
    places = [] if out is None else [out]
    if docs and (is_accelerator(data) or data is None):
        places.append(DOCS)
    if not places:
        raise SystemExit("--page: these results are no accelerator's; name a folder with --out")
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        page = text(data)
        if chart.draw(done(data), place / "device.png"):
            page += "\n![tokens/s by precision](device.png)\n"
        write(place / "device.md", page)
    return "\n".join(str(place / "device.md") for place in places)
