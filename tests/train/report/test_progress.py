"""The progress bar: alive on a terminal, plain lines in a pipe, tidy after an error."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from rich.console import Console

from mpjax.train.report.progress import ProgressBar, describe

SHOW = "\x1b[?25h"  # the terminal's cursor is back


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.0 + step, "tokens_per_s": 1000.0 * step} | more


def show(live: bool, records: list[dict[str, Any]], steps: int, **more: Any) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=live, width=100, color_system=None)
    with ProgressBar(steps, console=console, **more) as bar:
        for each in records:
            bar.update(each)
    return file.getvalue()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({}, "loss 2.5000 · 1,234 tokens/s"),
        ({"loss_scale": 1.0, "skipped": 0}, "loss 2.5000 · 1,234 tokens/s"),
        ({"loss_scale": 2.0**15}, "loss 2.5000 · 1,234 tokens/s · scale 2^15"),
        ({"loss_scale": 0.5}, "loss 2.5000 · 1,234 tokens/s · scale 2^-1"),
        ({"loss_scale": 1000.0}, "loss 2.5000 · 1,234 tokens/s · scale 1000"),
        ({"loss_scale": math.inf}, "loss 2.5000 · 1,234 tokens/s · scale inf"),
        ({"skipped": 3}, "loss 2.5000 · 1,234 tokens/s · 3 skipped"),
        ({"loss": math.nan}, "loss nan · 1,234 tokens/s"),
    ],
)
def test_a_step_in_words(more, text):
    assert describe({"loss": 2.5, "tokens_per_s": 1234.4} | more) == text


def test_a_terminal_sees_steps_left_time_and_numbers():
    text = show(True, [record(n, skipped=n, loss_scale=4.0) for n in range(1, 9)], 10)
    last = text.split("\n")[-2].split("\r")[-1]
    assert "train" in last and "8/10" in last
    assert "loss 10.0000 · 8,000 tokens/s · scale 2^2 · 8 skipped" in last
    assert re.search(r"\d:\d\d:\d\d", last)  # time left
    assert text.rstrip("\n").endswith(SHOW)


def test_a_pipe_sees_plain_lines_and_not_too_many():
    text = show(False, [record(n) for n in range(1, 101)], 100, lines=5)
    assert text.splitlines() == [
        f"train {n} · loss {2.0 + n:.4f} · {1000 * n:,} tokens/s" for n in (20, 40, 60, 80, 100)
    ]


@pytest.mark.parametrize(("steps", "lines"), [(1, 20), (7, 20), (21, 20), (39, 20), (1000, 20)])
def test_a_pipe_never_sees_more_lines_than_asked_for(steps, lines):
    text = show(False, [record(n) for n in range(1, steps + 1)], steps, lines=lines)
    assert 0 < len(text.splitlines()) <= lines


@pytest.mark.parametrize("live", [True, False])
def test_a_validation_record_changes_nothing(live):
    text = show(live, [record(1), {"step": 1, "validation_loss": 123.5}], 1)
    assert "loss 3.0000" in text and "123.5" not in text


def test_a_resumed_run_begins_where_it_left():
    assert "30/40" in show(True, [], 40, start=30)


def test_a_label_stands_before_the_line():
    assert show(False, [record(1)], 1, label="bf16").startswith("bf16 1 · loss")


def test_an_error_leaves_the_terminal_as_it_was():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)
    with pytest.raises(RuntimeError, match="inside"), ProgressBar(3, console=console) as bar:
        bar.update(record(1))
        raise RuntimeError("inside")
    assert file.getvalue().rstrip("\n").endswith(SHOW)
