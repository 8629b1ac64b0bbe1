"""A stage: what it trains or changes, and what it takes over from earlier ones."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import did_you_mean
from mpjax.optim.checks import check_seed, check_whole
from mpjax.train.step import TrainState, TrainStep
from mpjax.typing import Batch, Json, Params

TAKES = ("nothing", "weights", "weights+moments")
_NAME = re.compile(r"[A-Za-z0-9][\w+-]{0,99}")

Judge: TypeAlias = Callable[[Params], Mapping[str, float]]  # weights as stored -> scores by name


class Positioned(Protocol):
    """An iterator of batches whose position can be saved, such as those of `mpjax.data`."""

    def __next__(self) -> Batch: ...

    def __iter__(self) -> Positioned: ...

    def get_state(self) -> Json: ...

    def set_state(self, state: Json, /) -> None: ...


@dataclasses.dataclass(frozen=True)
class Training:
    """What a stage trains.

    Args:
      state: before the first step, from `mpjax.train.build` or `init_state`.
      step: the train step.
      batches: an iterator with `get_state()`, JSON-able, and `set_state()`; at its beginning.
      steps: of the stage.
      judge: weights -> scores by name, asked after the last step; None for no scores.
      seed: that the state was made with.

    Raises:
      ConfigError: steps below 1, or batches whose position cannot be saved.
    """

    state: TrainState
    step: TrainStep
    batches: Positioned
    steps: int
    judge: Judge | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("training", "steps", self.steps, 1)
        check_seed(self.seed)
        for name in ("get_state", "set_state"):
            if not callable(getattr(self.batches, name, None)):
                raise ConfigError(
                    f"training: batches, {brief(self.batches)}, have no {name}(), so that no kill"
                    " could be resumed at the same batch; take those of mpjax.data, or of grain"
                )


@dataclasses.dataclass(frozen=True)
class Edit:
    """What a stage of no steps makes of the weights that it reads, such as pruned ones.

    Args:
      params: the weights.
      judge: as of `Training`.
    """

    params: Params
    judge: Judge | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a plan.

    Args:
      name: of the stage and of its folder.
      make: weights of the stages in `reads`, by name -> the `Training` or `Edit`. It is called
        once without numbers, so that all stages are checked before the first begins, and once
        when the stage's turn comes.
      take: what a training starts with: `nothing` of others, `weights` and what the model threads
        through itself, or `weights+moments`, the state of the optimizer and its counts too, and the
        loss scale where its settings are the same.
      source: the earlier stage that it is taken from.
      reads: earlier stages whose weights `make` reads, such as a teacher's.
      new: patterns of weights that begin anew although the source has them, such as a head for
        other classes.
      settings: JSON, what the outcome depends on; a resume compares it.

    Raises:
      ConfigError: a name that is no folder's, an unknown `take`, or fields that do not fit.

    Example:
      >>> Stage("tune", lambda weights: ..., take="weigths", source="pretrain")
      Traceback (most recent call last):
      mpjax.errors.ConfigError: stage 'tune': unknown take 'weigths'; did you mean weights? ...
    """

    name: str
    make: Callable[[Mapping[str, Params]], Training | Edit]
    take: str = "nothing"
    source: str = ""
    reads: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    settings: Mapping[str, Json] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"stage {brief(self.name)}: the name is that of a folder; write letters, digits and"
                " _ + -, a letter or digit first"
            )
        where = f"stage {self.name!r}"
        if not callable(self.make):
            raise ConfigError(f"{where}: make is {brief(self.make)}; give a function")
        if self.take not in TAKES:
            hint = did_you_mean(str(self.take), TAKES)
            raise ConfigError(
                f"{where}: unknown take {brief(self.take)}; {hint}known: {' '.join(TAKES)}"
            )
        for name in ("reads", "new"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(
                    f"{where}: {name}={getattr(self, name)!r} is one text; give a tuple of them"
                )
        try:
            json.dumps(self.settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{where}: settings are no JSON ({error}); give texts, numbers and lists of them"
            ) from None
        if self.take == "nothing":
            for name in ("source", "new"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{where}: take=nothing does not read {name}={brief(getattr(self, name))};"
                        " leave it out, or take weights"
                    )
        elif not self.source:
            raise ConfigError(f"{where}: takes {self.take}, and no source says of which stage")

    def page(self) -> dict[str, Json]:
        """Returns what a resume compares, as JSON-able values."""
        return {
            **self.settings, "take": self.take, "source": self.source, "reads": list(self.reads),
            "new": list(self.new),
        }  # fmt: skip
