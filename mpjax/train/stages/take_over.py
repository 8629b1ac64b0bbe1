"""What a stage takes over from an earlier one: weights by path, and moments where they fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mpjax.errors import ConfigError
from mpjax.markdown import table
from mpjax.precision import matches
from mpjax.precision.rule import nearest
from mpjax.train.checkpoint.leaves import named_leaves
from mpjax.train.checkpoint.reader import CheckpointReader
from mpjax.train.checkpoint.recast import Shapes, describe_nodes
from mpjax.train.checkpoint.restore import match_leaves, restore_into
from mpjax.train.stages.stage import Stage, Training
from mpjax.train.step import TrainState, with_weights
from mpjax.typing import PyTree

_WEIGHTS, _THREADED, _MOMENTS = "params/", "model_state/", "opt_state/inner"


class TakeOver(NamedTuple):
    """What of an earlier stage another one begins with.

    Args:
      source: the earlier stage.
      taken: path -> how many numbers, of the weights that are taken.
      anew: of those that begin anew.
      dropped: of the source's that are left out.
      moments: whether the optimizer's state goes on.
      loss_scale: whether the loss scale goes on.
    """

    source: str
    taken: dict[str, int]
    anew: dict[str, int]
    dropped: dict[str, int]
    moments: bool = False
    loss_scale: bool = False

    def rows(self) -> list[tuple[str, str, int]]:
        """Returns (path, what becomes of it, numbers), the largest parts of which all is alike."""
        kinds = {"taken": self.taken, "anew": self.anew, "dropped": self.dropped}
        leaves = [
            (p.split("/"), kind, n) for kind, found in kinds.items() for p, n in found.items()
        ]
        return _rows(sorted(leaves))

    def __str__(self) -> str:
        rows = [(path, kind, f"{count:,}") for path, kind, count in self.rows()]
        rows.append(("moments", "taken" if self.moments else "anew", ""))
        if self.loss_scale:
            rows.append(("loss scale", "taken", ""))
        return table(("weights", f"of {self.source}", "numbers"), rows)


def _rows(leaves: list[tuple[list[str], str, int]], depth: int = 0) -> list[tuple[str, str, int]]:
    kinds = {kind for _, kind, _ in leaves}
    if len(kinds) == 1:
        prefixes = {"/".join(path[: max(depth, 1)]) for path, _, _ in leaves}
        name = prefixes.pop() if len(prefixes) == 1 else "all"
        return [(name, kinds.pop(), sum(count for _, _, count in leaves))]
    parts = dict.fromkeys(path[depth] for path, _, _ in leaves)
    return [
        row
        for part in parts
        for row in _rows([x for x in leaves if x[0][depth] == part], depth + 1)
    ]


class _Source(CheckpointReader):
    """A checkpoint without the weights that begin anew, and their copies."""

    def __init__(self, directory: Path, new: tuple[str, ...]) -> None:
        super().__init__(directory)
        self._new = new

    def read_leaves(self, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        return _without(super().read_leaves(step), self._new)


def _without(saved: Shapes, new: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: leaf for name, leaf in saved.items() if not _begins_anew(name, new)}


def _begins_anew(name: str, new: tuple[str, ...]) -> bool:
    """Whether a pattern matches a leaf's path, or the weight's in that of a copy of it."""
    parts = name.split("/")
    tails = ["/".join(parts[start:]) for start in range(1, len(parts))]
    return any(matches(pattern, tail) for pattern in new for tail in tails)


def _part(state: TrainState, moments: bool, loss_scale: bool) -> dict[str, PyTree]:
    """What of a fresh state is taken over, under the paths that a checkpoint has."""
    own = state.opt_state
    carried: dict[str, PyTree] = {"update_state": own.update_state}
    if moments:
        carried["inner"] = own.inner
    if loss_scale:
        carried["loss_scale"] = own.loss_scale
    part: dict[str, PyTree] = {"params": state.params, "opt_state": carried}
    return part if state.model_state is None else part | {"model_state": state.model_state}


def match(stage: Stage, fresh: TrainState, source: PyTree) -> TakeOver:
    """Returns what a stage takes over, of shapes alone.

    Args:
      stage: which takes something.
      fresh: its state before the first step, abstract.
      source: what the source saves, abstract.

    Raises:
      ConfigError: no weight is taken, one has another shape or is quantised in the source, or
        moments are asked for that do not fit.
    """
    where, moments = f"stage {stage.name!r}", stage.take == "weights+moments"
    trained = isinstance(source, TrainState)
    if moments and not trained:
        raise ConfigError(
            f"{where}: {stage.source!r} trains nothing and has no moments; set take=weights"
        )
    scale = moments and _same_scale(fresh, source)
    part, held = _part(fresh, moments, scale), named_leaves(source)
    named = {n: x for n, x in named_leaves(part).items() if n.startswith((_WEIGHTS, _THREADED))}
    own = {name: leaf for name, leaf in named.items() if name.startswith(_WEIGHTS)}
    paths = [name.removeprefix(_WEIGHTS) for name in own]
    for pattern in stage.new:
        if not any(_begins_anew(name, (pattern,)) for name in named):
            parents = {path.rpartition("/")[0] for path in paths} - {""}
            raise ConfigError(
                f"{where}: new={pattern} matches no weight; {nearest(pattern, [*parents, *paths])}"
            )
    saved = _without(held, stage.new)
    for name, leaf in named.items():
        path = name.removeprefix(_WEIGHTS).removeprefix(_THREADED)
        if f"{name}/values" in saved:
            raise ConfigError(
                f"{where}: {path} is quantised in {stage.source!r}, which cannot be trained on;"
                " take weights of the stage before it"
            )
        if name in saved and saved[name].shape != leaf.shape:
            raise ConfigError(
                f"{where}: {path} has shape {saved[name].shape} in {stage.source!r} and"
                f" {leaf.shape} here; begin it anew, new={path.rpartition('/')[0] or path}, or give"
                " both stages the same model"
            )
    taken = {name for name in own if name in saved}
    if not taken:
        raise ConfigError(
            f"{where}: none of its weights, such as {min(paths)}, is in {stage.source!r}, which has"
            f" {min(_counts(held))}; give both stages the same kind of model, or take=nothing"
        )
    if moments:
        _require_moments(where, stage.source, part, saved, describe_nodes(source))
    anew, counts = own.keys() - taken, _counts(held)
    return TakeOver(
        stage.source, _counts({n: own[n] for n in own if n in taken}),
        _counts({n: own[n] for n in own if n in anew}),
        {path: count for path, count in counts.items() if path not in paths}, moments, scale,
    )  # fmt: skip


def _counts(named: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, int]:
    """Path of each weight -> its numbers."""
    return {
        name.removeprefix(_WEIGHTS): math.prod(leaf.shape)
        for name, leaf in named.items()
        if name.startswith(_WEIGHTS)
    }


def _same_scale(fresh: TrainState, source: TrainState) -> bool:
    """Whether both have a loss scale of the same settings, which a schedule keeps elsewhere."""
    if fresh.switch is not None or source.switch is not None:
        return False
    scales = [state.opt_state.loss_scale for state in (fresh, source)]
    kinds: list[Any] = [jax.tree.structure(scale) for scale in scales]
    return kinds[0] == kinds[1] and bool(jax.tree.leaves(scales))


def _require_moments(
    where: str, source: str, part: PyTree, saved: Shapes, nodes: Mapping[str, str]
) -> None:
    found = match_leaves(part, saved, nodes)
    lacking = [n for n, s in found.sources.items() if n.startswith(_MOMENTS) and s is None]
    used = {name for name in found.sources.values() if name}
    for root in found.roots:
        lacking += [f"{root.path}/{name}" for name in root.parts() if name not in root.saved]
        used |= {name for name, _ in root.saved.values()} | {f"{root.path}/draws"}
    more = [
        n for n in saved
        if n.startswith(_MOMENTS) and not used & {n, n.rpartition("/")[0]}  # codes, absmax below it
    ]  # fmt: skip
    if lacking or more:
        what = f"has no {lacking[0]}" if lacking else f"has {more[0]}, which is not here"
        raise ConfigError(
            f"{where}: the optimizer states do not fit, {source!r} {what}; set take=weights, or"
            " give both stages one optimizer and model"
        )


def take_over(stage: Stage, made: Training, taken: TakeOver, directory: Path) -> TrainState:
    """Returns the first state of a stage, with what it takes over.

    Args:
      stage: which takes something.
      made: what it trains.
      taken: what `match` returned.
      directory: checkpoints of the source.

    Raises:
      ConfigError: a number overflows the dtype that it is stored in here.
    """
    state = made.state
    part = _part(state, taken.moments, taken.loss_scale)
    try:
        part, _ = restore_into(part, _Source(directory, stage.new))
    except ConfigError as error:
        raise ConfigError(f"stage {stage.name!r}: {error}") from None
    carried = part["opt_state"]
    if not taken.moments:  # some optimizers begin with copies of the weights
        shardings = made.step.shardings
        init = jax.jit(
            lambda params: made.step.optimizer.init(params, made.seed).inner,
            out_shardings=None if shardings is None else shardings.opt_state.inner,
        )
        carried["inner"] = init(part["params"])
    begun = with_weights(state, part["params"], state.opt_state._replace(**carried))
    return begun._replace(model_state=part.get("model_state"))
