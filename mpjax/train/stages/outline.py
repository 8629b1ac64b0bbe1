"""All stages of a plan without numbers: every mistake comes before the first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import did_you_mean
from mpjax.train.stages.stage import Edit, Stage, Training
from mpjax.train.stages.take_over import TakeOver, match
from mpjax.train.step import TrainState
from mpjax.typing import Params, PyTree


class Outline(NamedTuple):
    """A stage without numbers.

    Args:
      state: what its checkpoints hold, abstract: a TrainState, or `{"params": ...}` of an edit.
      steps: of a training; 0 of an edit.
      taken: what it takes over; None if nothing.
    """

    state: PyTree
    steps: int
    taken: TakeOver | None

    @property
    def params(self) -> Params:
        """The weights at the end, abstract."""
        return self.state.params if isinstance(self.state, TrainState) else self.state["params"]


def check_stages(stages: Sequence[Stage]) -> dict[str, Outline]:
    """Checks a plan as a whole; nothing is computed and nothing is written.

    Args:
      stages: in their order.

    Returns:
      Name -> outline of each stage.

    Raises:
      ConfigError: no stage, two of one name, one that needs what none before it made, a mistake in
        what one trains, or weights that do not fit.

    Example:
      >>> check_stages([Stage("tune", lambda weights: ..., take="weights", source="pretrain")])
      Traceback (most recent call last):
      mpjax.errors.ConfigError: stage 'tune': needs 'pretrain', which no stage before it makes; ...
    """
    outlines: dict[str, Outline] = {}
    for stage in stages:
        if not isinstance(stage, Stage):
            raise ConfigError(f"stages: {brief(stage)} is no Stage; give Stage(name, make, ...)")
        if stage.name in outlines:
            raise ConfigError(f"stage {stage.name!r}: stands twice; give each a name of its own")
        for name in dict.fromkeys([*filter(None, [stage.source]), *stage.reads]):
            if name not in outlines:
                hint = did_you_mean(name, outlines)
                raise ConfigError(
                    f"stage {stage.name!r}: needs {name!r}, which no stage before it makes;"
                    f" {hint}before it: {' '.join(outlines) or 'none'}"
                )
        outlines[stage.name] = _outline(stage, outlines)
    if not outlines:
        raise ConfigError("stages: none; give at least one")
    return outlines


def made_by(stage: Stage, weights: Mapping[str, Params]) -> Training | Edit:
    """Returns what a stage makes; its mistakes say which stage it is.

    Raises:
      ConfigError: it makes something else, or what `make` raises.
    """
    try:
        made = stage.make(weights)
    except ConfigError as error:
        raise ConfigError(f"stage {stage.name!r}: {error}") from None
    if not isinstance(made, Training | Edit):
        raise ConfigError(
            f"stage {stage.name!r}: make returned {brief(made)}; return a Training or an Edit"
        )
    if isinstance(made, Edit) and stage.take != "nothing":
        raise ConfigError(
            f"stage {stage.name!r}: an Edit trains nothing that could take {stage.take}; name the"
            " stage in reads, whose weights make is given"
        )
    return made


def _outline(stage: Stage, before: Mapping[str, Outline]) -> Outline:
    steps = 0
    # Zeros, not tracers: a step asks on which devices the weights of a teacher are.
    weights = {
        name: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), before[name].params)
        for name in stage.reads
    }

    def state() -> PyTree:
        nonlocal steps
        made = made_by(stage, weights)
        if isinstance(made, Edit):
            return {"params": made.params}
        steps = made.steps
        return made.state

    found = jax.eval_shape(state)
    taken = None
    if stage.take != "nothing":
        taken = match(stage, found, before[stage.source].state)
    return Outline(found, steps, taken)
