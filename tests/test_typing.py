"""A type checker says what someone's own model lacks, before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from mypy import api

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = '''
from __future__ import annotations

import jax
import optax

from mpjax.ops import Objective, rows_alike
from mpjax.optim import wrap
from mpjax.precision import get_precision
from mpjax.train import build, make_train_step
from mpjax.typing import Array, Batch, Key, ModelState, Params, PyTree, Shard


class Model:
    """Has what `build` asks for, or not."""

    precision = get_precision("fp32")
    {axes}

    def init(self, key: Key) -> Params:
        return jax.random.normal(key, (3,))

    def loss(
        self, params: Params, batch: Batch, *, state: ModelState, key: Key, {train}: bool
    ) -> tuple[Array, ModelState]:
        return params.mean(), state

    def sharded(self, shard: Shard) -> Model:
        return self


build(Model(), optax.sgd(0.1))
Objective.of_model(Model())
make_train_step(Model().loss, wrap(optax.sgd(0.1), "fp32"), count=rows_alike)
'''
AXES = "axes: PyTree = None"
# name -> what the model has, and what the checker says of it
PROGRAMS: dict[str, tuple[str, str, list[str]]] = {
    "whole": (AXES, "train", []),
    "no_axes": ("", "train", ['to "build" has incompatible type', "missing", "axes"]),
    "other_loss": (
        AXES,
        "training",
        ['"of_model" of "Objective" has incompatible', '"make_train_step" has incomp'],
    ),
}


def test_a_checker_says_what_a_model_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    # With the options of `mypy mpjax experiments`, whose cache lies there: others would empty it.
    monkeypatch.chdir(ROOT)
    files = [tmp_path / f"{name}.py" for name in PROGRAMS]
    for file, (axes, train, _) in zip(files, PROGRAMS.values(), strict=True):
        file.write_text(PROGRAM.format(axes=axes, train=train))
    found, errors, _ = api.run([*map(str, files)])
    assert not errors
    for name, (_, _, said) in PROGRAMS.items():
        lines = [line for line in found.splitlines() if f"{name}.py" in line]
        assert bool(lines) == bool(said), found
        assert not [text for text in said if text not in "\n".join(lines)], found
