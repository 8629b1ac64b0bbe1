"""A run that stops leaves a bundle, and `mpjax.replay` runs its last step again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mpjax import replay
from mpjax.errors import ConfigError, TrainingStopped
from mpjax.models import decoder
from mpjax.optim import make_optimizer
from mpjax.train import build
from mpjax.train.checkpoint.bundle import BUNDLE, load_bundle, read_meta, save_bundle
from mpjax.train.loop import fit

pytestmark = pytest.mark.usefixtures("fast_compile")

OPTIMIZER = {
    "name": "sgd", "lr": 0.1, "schedule": "constant", "steps": 9, "warmup": 0, "weight_decay": 0.0,
}  # fmt: skip
BUILD = {"seed": 0, "clip": None, "patience": 1, "accumulate": 1}


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_stopped_run_is_explained_again(tmp_path: Path, capsys: Any) -> None:
    model = decoder(
        "tiny", "p=f32,c=f16,o=f16", layers=1, width=8, heads=1, vocabulary=16, context=4
    )
    state, step = build(model, make_optimizer(**OPTIMIZER), None, **BUILD)
    # one weight too large for the float16 that the model computes in
    bad = lambda path, w: w.at[0].set(1e6) if "embed" in jax.tree_util.keystr(path) else w  # noqa: E731
    state = state._replace(params=jax.tree_util.tree_map_with_path(bad, state.params))
    batch = {"inputs": np.zeros((8, 4), np.int32), "targets": np.ones((8, 4), np.int32)}
    meta = {
        "model": dataclasses.asdict(model.config), "precision": model.precision.to_dict(),
        "optimizer": OPTIMIZER, "build": BUILD, "mesh": "", "devices": 1,
    }  # fmt: skip
    before, kept = bits(state.params), []

    def stuck(number: int, state: Any, batch: Any) -> None:
        kept.append(state)
        save_bundle(tmp_path, number, state, batch, meta)

    with pytest.raises(TrainingStopped):
        fit(state, step, iter([batch] * 9), steps=9, report=lambda record: None, stuck=stuck)
    assert read_meta(tmp_path) == json.loads(json.dumps(meta))
    restored, found, number = load_bundle(tmp_path / BUNDLE, kept[0])
    assert bits(restored) == bits(kept[0]) and bits(restored.params) == before
    assert number >= 1 and {k: v.tolist() for k, v in found.items()} == {
        k: v.tolist() for k, v in batch.items()
    }

    assert replay.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"step {number} (on one device; the run had 1)\nfirst inf: ")
    assert "convert_element_type, forward pass" in said
    assert "decoder/embed" in said and "does not fit" in said


def test_a_folder_without_a_bundle_is_an_error(tmp_path: Path, capsys: Any) -> None:
    assert replay.main([str(tmp_path)]) == 2
    assert "holds no replay bundle" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="holds no replay bundle"):
        read_meta(tmp_path)
