"""Imported checkpoints give the logits that transformers gave; planted mistakes do not.

`tests/golden/hf_logits.json` holds what transformers gave
(`benchmarks/checkpoints/hf_logits.py` wrote it).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpjax.models.hf import load_checkpoint
from tests.models.hf import cases, ours

pytestmark = pytest.mark.usefixtures("fast_compile")

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "hf_logits.json").read_text())["cases"]


def difference(name: str, folder: Path) -> float:
    return ours.worst(name, ours.outputs(name, *load_checkpoint(folder)), GOLDEN[name]["logits"])


@pytest.mark.parametrize("name", cases.CONFIGS)
def test_logits_of_transformers(name: str, tmp_path: Path) -> None:
    assert difference(name, ours.write(name, GOLDEN[name]["tensors"], tmp_path)) <= ours.BAR


@pytest.mark.parametrize("mistake", ["rotary pairs for halves",
                                     "a window one longer"])  # fmt: skip
def test_a_mistake_is_seen(mistake: str, tmp_path: Path) -> None:
    name, change = ours.CONTROLS[mistake]
    ours.write(name, GOLDEN[name]["tensors"], tmp_path)
    change(tmp_path)
    assert difference(name, tmp_path) > 100 * ours.BAR
