"""Answers of a run on the command line: python -m mpjax.predict RUN --text '...' | --data FILE."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from mpjax.commands import run_command
from mpjax.data.tables.columns import TOOLS, column_names, conversation_column, read_columns
from mpjax.errors import ConfigError
from mpjax.finetuning import load_run

_BATCH = 32


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mpjax.predict",
        description="Answers texts by the best weights of a run; a line of JSON for each.",
    )
    parser.add_argument("run", help="folder of a run: --out of experiments/finetune.py")
    parser.add_argument("--text", nargs="+", default=[], help="texts")
    parser.add_argument("--second", nargs="+", default=[], help="second texts of pairs")
    parser.add_argument("--data", help="a table of texts, in place of --text")
    parser.add_argument("--column", default="", help="its column of texts; the run's by default")
    parser.add_argument("--second-column", default="", help="its column of second texts")
    parser.add_argument("--batch", type=int, default=_BATCH, help="texts at a time")
    parser.add_argument("--tokens", type=int, default=64, help="most tokens that are written")
    parser.add_argument("--precision", default=None, help="to compute in; the run's by default")
    parser.add_argument("--weights", default="", help="storage, such as int8 or int4@32")
    return parser


def asked(messages: list[Any]) -> list[Any]:
    """A conversation up to its last question."""
    ends = [place for place, m in enumerate(messages) if m["role"] != "assistant"]
    return messages[: ends[-1] + 1] if ends else messages


def _texts(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, list[Any]]:
    """What is asked for, as `Tuned.predict` takes it."""
    if bool(options.text) == bool(options.data):
        raise ConfigError("give either --text or --data")
    if options.text:
        return {"texts": options.text, "seconds": options.second}
    kinds = {"text": "text"}
    talks = settings["task"] == "instruct"
    columns = {"text": options.column or settings["text"] or ("prompt" if talks else "text")}
    if talks and not (options.column or settings["text"]):
        there = column_names(options.data)
        if name := conversation_column(there):
            kinds = {"turns": "turns"} | ({TOOLS: TOOLS} if TOOLS in there else {})
            found = read_columns(options.data, kinds, {"turns": name}).values
            read = {field: list(map(json.loads, values)) for field, values in found.items()}
            return {"texts": list(map(asked, read["turns"])), "tools": read.get(TOOLS, [])}
    if settings["task"] == "pair" or settings["second"]:
        kinds["second"] = "text"
        columns["second"] = options.second_column or settings["second"] or "second"
    found = read_columns(options.data, kinds, columns).values
    return {"texts": found["text"], "seconds": found.get("second", [])}


def _answer(options: argparse.Namespace) -> None:
    run = load_run(options.run, options.precision, weights=options.weights)
    question = _texts(options, run.settings)
    answers = run.predict(**question, batch=options.batch, tokens=options.tokens)
    for text, answer in zip(question["texts"], answers, strict=True):
        print(json.dumps({"input": text} | answer, ensure_ascii=False))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the answers; returns the exit status."""
    return run_command(_parser(), _answer, arguments)


if __name__ == "__main__":
    sys.exit(main())
