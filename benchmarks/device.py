"""Measures mpjax on the accelerator of this machine, in the minutes that there are.

Run:       python benchmarks/device.py --minutes 8      (or make verify-device)
Expected:  every check of part a holds; on an H100 or H200 ours in bf16 is at least as fast as
           compiled torch with an MFU of 45 %, fp8 1.2 times our bf16 with no more memory. What is
           not so is published all the same. Code 1 where a check of part a does not hold, or
           there is no device to read.

Cells run one after the other, the most valuable first, in a process that holds the device; one that
would run past the end is skipped. `device.json` and `device.md` in the folder `--out` are written
after each, so that what is done is kept whenever this ends. The page of an accelerator, all parts
at full size, goes to docs/evidence too. Nothing is installed and nothing downloaded: what is
missing may lie as wheels in `wheels/` (make device-wheels).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.on_device import page  # noqa: E402
from benchmarks.on_device.cells import CELLS, PARTS, SIZES, Cell  # noqa: E402
from benchmarks.on_device.measures import machine  # noqa: E402
from benchmarks.on_device.record import Record  # noqa: E402
from benchmarks.on_device.workers import Workers, carried  # noqa: E402

HEADER = Cell("machine", "device", "machine:device", full=20, tiny=20)
CLOSING = 3.0  # seconds that the last page and the end of the processes take


def chosen(only: list[str], size: str) -> list[Cell]:
    """Returns the cells of a size, of the parts or with the words in their names asked for."""
    letters = {letter: part for part, letter in PARTS.items()}
    words = [letters.get(word, word) for word in only]
    cells = [c for c in CELLS if c.estimate(size) > 0]
    cells = [c for c in cells if not words or any(w == c.part or w in c.name for w in words)]
    if not cells:
        raise SystemExit(f"--only {' '.join(only)}: no such part or cell; parts: {' '.join(PARTS)}")
    return cells


def measure(record: Record, workers: Workers, cells: list[Cell], size: str, end: float) -> None:
    """Runs the cells that fit before `end`, a time of `time.monotonic`."""
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f} s] {text}", flush=True)

    found = workers.run(HEADER, size, end)
    if found["state"] != "done":
        record.describe(problem=f"the device could not be read: {found['why']}")
        return say(record.header["problem"])
    record.describe(**found["result"])
    say(f"{record.header['device']}, jax {record.header['jax']}")
    if size == "full" and record.header["platform"] == "cpu":
        record.describe(problem="JAX sees no accelerator here, and a CPU takes hours for this size")
        return say(record.header["problem"])
    has_torch = "torch" in record.header["versions"]
    separate = record.header["memory"] is not None  # else a process's peak memory is not known
    for cell in cells:
        left, estimate = end - time.monotonic(), cell.estimate(size)
        if cell.torch and not has_torch:
            record.put(cell, state="skipped", why="torch is not installed")
        elif left < estimate:
            why = f"about {estimate:.0f} s, and {max(left, 0):.0f} s were left"
            record.put(cell, state="skipped", why=why)
        else:
            start = time.monotonic()
            found = workers.run(cell, size, end, fresh=cell.alone and separate)
            seconds = time.monotonic() - start
            record.put(cell, seconds=round(seconds, 2), clocks=machine.clocks(), **found)
        say(record.line(cell))
        record.save()


def main() -> int:
    """Reads the command line, measures, and writes."""
    parser = argparse.ArgumentParser(description="Measures mpjax on this machine's accelerator.")
    parser.add_argument("--minutes", type=float, default=8.0, help="that all of it may take")
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    parser.add_argument("--out", type=Path, help="folder of results; runs/device by default")
    only = "right fast peers tools (a b c d), or words in the names of cells"
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=only)
    what = "only write the page: of these results, a later file's first; of none at all"
    parser.add_argument("--page", nargs="*", type=Path, metavar="JSON", help=what)
    args = parser.parse_args()
    if args.page is not None:
        print(page.publish(Record.joined(args.page), args.out))
        return 0
    end = time.monotonic() + 60 * args.minutes - CLOSING
    out = args.out or ROOT / "runs" / "device"
    out.mkdir(parents=True, exist_ok=True)
    cells = chosen(args.only, args.size)
    command = " ".join(["python", "benchmarks/device.py", *sys.argv[1:]])
    record = Record.new(out, args.size, args.minutes, machine.host(command), cells)
    record.save()
    with tempfile.TemporaryDirectory(prefix="mpjax-device-") as scratch:
        workers = Workers(carried(ROOT / "wheels", Path(scratch)), Path(scratch), args.size)
        try:
            measure(record, workers, cells, args.size, end)
        finally:
            workers.stop()
            record.save()
    # A part of the measurements is no page of its own: --page joins it with the others.
    print(page.publish(record.data, out, docs=not args.only), flush=True)
    return int(record.wrong() or "problem" in record.header)


if __name__ == "__main__":
    sys.exit(main())
