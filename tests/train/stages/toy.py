"""A network of two layers with a head a task, data whose position is a number, and their stages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mpjax.paths import leaves_with_names
from mpjax.precision import Precision, get_precision
from mpjax.train import CheckpointReader, build, read_metrics
from mpjax.train.checkpoint.leaves import target
from mpjax.train.stages import Edit, Stage, Training, run_stages

WIDTH, STEPS = 8, 6


@dataclasses.dataclass(frozen=True)
class Toy:
    """A model with a trunk and one head; noise of the step's key stands for dropout."""

    head: str
    precision: Precision
    out: int = 4

    @property
    def axes(self) -> Any:
        head = {"kernel": ("embed", None)}
        return {"net": {"trunk": {"kernel": ("embed", "mlp")}, self.head: head}}

    def init(self, key: Any) -> Any:
        dtype = jnp.dtype(self.precision.policy("net/trunk").param_dtype)
        trunk = jax.random.normal(key, (WIDTH, WIDTH)) / 3
        head = jax.random.normal(jax.random.fold_in(key, 1), (WIDTH, self.out)) / 3
        net = {"trunk": {"kernel": trunk}, self.head: {"kernel": head}}
        return {"net": jax.tree.map(lambda x: x.astype(dtype), net)}

    def sharded(self, shard: Any) -> Toy:
        return self

    def loss(self, params: Any, batch: Any, *, state: Any = None, key: Any, train: bool) -> Any:
        low = jnp.dtype(self.precision.policy("net/trunk").compute_dtype)
        net = jax.tree.map(lambda x: x.astype(low), params["net"])
        noise = 0.01 * jax.random.normal(key, batch["x"].shape)
        y = jnp.tanh((batch["x"] + noise).astype(low) @ net["trunk"]["kernel"])
        y = (y @ net[self.head]["kernel"]).astype(jnp.float32)
        return jnp.mean((y - batch["x"][:, : self.out]) ** 2), state


class Data:
    """Batches made of their number; `still` gives the same one always."""

    def __init__(self, seed: int = 0, still: bool = False) -> None:
        self.seed, self.still, self.place = seed, still, 0

    def __iter__(self) -> Data:
        return self

    def __next__(self) -> Any:
        self.place += 1
        draw = np.random.default_rng((self.seed, 0 if self.still else self.place))
        return {"x": draw.normal(size=(8, WIDTH)).astype(np.float32)}

    def get_state(self) -> Any:
        return {"place": self.place}

    def set_state(self, state: Any) -> None:
        self.place = state["place"]


def judge(params: Any) -> dict[str, float]:
    return {
        "validation_loss": float(sum(abs(np.float64(x)).sum() for x in jax.tree.leaves(params)))
    }


def training(
    head: str = "first", precision: Any = "bf16", optimizer: Any = None, *, steps: int = STEPS,
    data: Any = Data, out: int = 4, mesh: str | None = None, scored: Any = judge, **options: Any,
) -> Any:  # fmt: skip
    """What makes a training of the toy."""

    def make(weights: Any) -> Training:
        model = Toy(head, get_precision(precision), out)
        raw = optax.adam(0.01) if optimizer is None else optimizer
        state, step = build(model, raw, mesh, **options)
        return Training(state, step, data(), steps, scored)

    return make


def halved(weights: Any) -> Edit:
    (params,) = weights.values()
    return Edit(jax.tree.map(lambda x: x / 2, params), judge)


PLAN = (
    Stage("first", training(), settings={"lr": 0.01}),
    Stage("small", halved, reads=("first",)),
    # its first steps overflow float16 and are skipped
    Stage("then", training("second", "fp16 loss_scale=dynamic:init=1048576,interval=3"), "weights",
          "small"),
)  # fmt: skip


def saved(folder: Path, name: str, step: int = STEPS) -> dict[str, Any]:
    """The leaves of a stage's checkpoint."""
    reader = CheckpointReader(folder / name / "checkpoints")
    wanted = {n: target(leaf) for n, leaf in reader.read_leaves(step).items()}
    return {n: np.asarray(x) for n, x in reader.read(wanted, step).items()}


def bits(folder: Path, stages: Any = PLAN) -> dict[str, Any]:
    """All that a run leaves which two runs share."""
    found: dict[str, Any] = {}
    for stage in stages:
        own = folder / stage.name
        reader = CheckpointReader(own / "checkpoints")
        step = reader.steps()[-1]
        leaves = saved(folder, stage.name, step)
        found |= {f"{stage.name}/{n}": (x.dtype, x.tobytes()) for n, x in leaves.items()}
        records = read_metrics(own / "metrics.jsonl")
        for record in records:
            record.pop("tokens_per_s", None)
        found[f"{stage.name} log"] = [json.dumps(record) for record in records]
        found[f"{stage.name} rest"] = (reader.read_meta(step), (own / "done.json").read_text())
    return found


def run(folder: Path, stages: Any = PLAN, **options: Any) -> Any:
    return run_stages(stages, folder, save_every=2, **options)


def params(folder: Path, name: str, step: int = STEPS) -> dict[str, np.ndarray]:
    """Path -> weight of a stage's checkpoint."""
    return {
        n.removeprefix("params/"): x
        for n, x in saved(folder, name, step).items()
        if n.startswith("params/")
    }


def named(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in leaves_with_names(tree)}
