"""From the settings of a run to its data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mpjax.data.tables.columns import TOOLS, column_names, conversation_column
from mpjax.errors import ConfigError
from mpjax.finetuning.finetuning_settings import Finetuning
from mpjax.finetuning.of_decoders import Documents, Instructions, Sequences
from mpjax.finetuning.of_encoders import Texts, read_tagged
from mpjax.finetuning.table_sides import read_sides
from mpjax.finetuning.work import Source

_COLUMNS = {"instruct": ("prompt", "answer"), "seq2seq": ("source", "target")}


def read_source(settings: Finetuning, data: Any) -> Source:
    """Reads the data of a run.

    Raises:
      ConfigError: data that cannot be read, or that the task cannot take.
    """
    if settings.task == "tag":
        return read_tagged(settings, data)
    if settings.task == "lm":
        if not isinstance(data, str | Path):
            raise ConfigError(
                "data: lm reads a file, a folder, FILE.jsonl:COLUMN, FILE.parquet:COLUMN or hf:NAME"
            )
        if settings.validation:
            raise ConfigError("validation: lm holds out documents of its data; set held_out")
        return Documents(settings, str(data))
    if not (settings.text or settings.label):
        there = column_names(data)
        talks = conversation_column(there)
        if settings.task == "instruct" and talks:
            kinds, columns = {"messages": "messages"}, {"messages": talks}
            if TOOLS in there:
                kinds[TOOLS] = columns[TOOLS] = TOOLS
            return Instructions(read_sides(settings, data, kinds, columns))
        if settings.task == "instruct" and "completion" in there and "answer" not in there:
            settings = dataclasses.replace(settings, label="completion")
        if settings.task == "classify" and talks and "text" not in there:
            raise ConfigError(
                f"data: a table of conversations ({talks!r}) has no 'text'; give the task"
                " 'instruct', or name a column of texts"
            )
    kinds = {"text": "text", "label": "number" if settings.task == "regress" else "class"}
    columns = {"text": settings.text, "label": settings.label}
    if settings.task in _COLUMNS:
        kinds["label"] = "text"
        columns = {
            field: columns[field] or name
            for field, name in zip(columns, _COLUMNS[settings.task], strict=True)
        }
    if settings.task == "pair" or settings.second:
        kinds["second"], columns["second"] = "text", settings.second
    sides = read_sides(settings, data, kinds, columns)
    kind: Any = {"instruct": Instructions, "seq2seq": Sequences}.get(settings.task, Texts)
    return kind(sides)
