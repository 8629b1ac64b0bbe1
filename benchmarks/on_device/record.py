"""What was measured so far, as one JSON file that is whole at every moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.on_device import page
from benchmarks.on_device.cells import Cell
from benchmarks.on_device.files import write


class Record:
    """The results of a run.

    Args:
      out: folder of `device.json` and `device.md`.
      data: what goes into the file.
    """

    def __init__(self, out: Path, data: dict[str, Any]) -> None:
        self.out, self.data = out, data
        self._at = {cell["name"]: cell for cell in data["cells"]}

    @classmethod
    def new(
        cls, out: Path, size: str, minutes: float, header: dict[str, Any], cells: list[Cell]
    ) -> Record:
        """Returns a record in which every cell is still to come."""
        rows = [{"part": c.part, "name": c.name, "state": "to come"} for c in cells]
        return cls(
            out,
            {"schema": 1, "size": size, "minutes": minutes, "header": header, "cells": rows},
        )

    @staticmethod
    def joined(paths: list[Path]) -> dict[str, Any] | None:
        """Returns the results of several files as one; what is done in a later one counts."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        if not found:
            return None
        cells: dict[str, Any] = {}
        for data in found:
            for cell in data["cells"]:
                old = cells.get(cell["name"])
                if old is None or cell["state"] == "done" or old["state"] != "done":
                    cells[cell["name"]] = cell
        commands = "; ".join(dict.fromkeys(data["header"]["command"] for data in found))
        header = found[-1]["header"] | {"command": commands}
        minutes = sum(data["minutes"] for data in found)
        return found[-1] | {"header": header, "cells": list(cells.values()), "minutes": minutes}

    @property
    def header(self) -> dict[str, Any]:
        """On what it is measured."""
        return dict(self.data["header"])

    def describe(self, **found: Any) -> None:
        """Records what is known of the device."""
        self.data["header"].update(found)
        self.save()

    def put(self, cell: Cell, **found: Any) -> None:
        """Records what became of a cell."""
        self._at[cell.name].update(found)

    def line(self, cell: Cell) -> str:
        """Returns one line about a cell."""
        return page.line(self._at[cell.name])

    def wrong(self) -> bool:
        """Returns whether a check of part a was made and does not hold."""
        return any(page.is_wrong(cell) for cell in self.data["cells"])

    def save(self) -> None:
        """Writes both files."""
        write(self.out / "device.json", json.dumps(self.data, indent=1) + "\n")
        write(self.out / "device.md", page.text(self.data))
