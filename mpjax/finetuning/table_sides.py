"""Rows of a table as two sides: what is trained on, and what judges."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpjax.data.split import held_out, stratified
from mpjax.data.tables.columns import read_columns
from mpjax.errors import ConfigError
from mpjax.finetuning.finetuning_settings import Finetuning
from mpjax.finetuning.work import Lines
from mpjax.typing import Settings


def split(
    settings: Finetuning, contents: Sequence[str], classes: Sequence[str] | None
) -> np.ndarray:
    """Returns which examples judge, (N,) bool; of classes the same share of each."""
    if classes is None:
        return held_out(contents, settings.held_out, seed=settings.seed)
    return stratified(contents, classes, settings.held_out, seed=settings.seed)


@dataclasses.dataclass(frozen=True)
class Sides:
    """Rows of a table, split.

    Args:
      settings: of the run.
      train: field -> one entry a row.
      test: likewise, of the side that judges.
      lines: what was read.
    """

    settings: Finetuning
    train: dict[str, list[Any]]
    test: dict[str, list[Any]]
    lines: Lines


def read_sides(settings: Finetuning, data: Any, kinds: Settings, columns: Settings) -> Sides:
    """Reads both sides; equal rows lie on one of them."""
    named = {field: name for field, name in columns.items() if name}

    def read(source: Any, what: str) -> tuple[dict[str, list[Any]], Lines]:
        found = read_columns(source, kinds, named, missing=settings.missing)
        values = found.values
        rows = list(zip(*values.values(), strict=True))
        first = dict.fromkeys(rows)
        repeats = len(rows) - len(first)
        lines = [(f"{what}: rows read", f"{found.read}")]
        if found.missing:
            lines.append((f"{what}: left out, a cell is missing", f"{found.missing}"))
        if found.blank:
            lines.append((f"{what}: blank", f"{found.blank}"))
        if repeats:
            dropped = settings.duplicates == "drop"
            fate = "left out" if dropped else "kept (--duplicates drop leaves them out)"
            lines.append((f"{what}: repeat an earlier row", f"{repeats}, {fate}"))
            rows = list(first) if dropped else rows
        return dict(zip(values, map(list, zip(*rows, strict=True)), strict=True)), lines

    values, lines = read(data, "data")
    contents = _contents(values)
    if settings.validation:
        test, more = read(settings.validation, "validation")
        known = set(_contents(test))
        out = np.array([content in known for content in contents])
        if out.any():
            more.append(("left out of training, held out too", f"{int(out.sum())}"))
        if out.all():
            raise ConfigError(
                f"validation {settings.validation!r}: holds every text of the data; give other"
                " texts, or leave it out for a share of the data"
            )
        lines += more
    else:
        classes = values["label"] if kinds.get("label") == "class" else None
        out = split(settings, contents, classes)
        test = _taken(values, out)
    train = _taken(values, ~out)
    sizes = [len(next(iter(side.values()))) for side in (train, test)]
    lines += [("for training", f"{sizes[0]}"), ("held out", f"{sizes[1]}")]
    return Sides(settings, train, test, lines)


def _contents(values: Mapping[str, list[Any]]) -> list[str]:
    """What makes rows alike: their texts, whatever the label or the answers."""
    if "messages" in values:
        talks = (json.loads(one) for one in values["messages"])
        return [json.dumps([m for m in talk if m["role"] != "assistant"]) for talk in talks]
    texts = [values[name] for name in ("text", "second") if name in values]
    return ["\0".join(parts) for parts in zip(*texts, strict=True)]


def _taken(values: Mapping[str, list[Any]], chosen: np.ndarray) -> dict[str, list[Any]]:
    places = np.flatnonzero(chosen)
    return {field: [one[i] for i in places] for field, one in values.items()}
