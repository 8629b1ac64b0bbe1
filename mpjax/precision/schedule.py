"""Schedules of Precision over a run, fixed, mixed, late and dynamic, and how they are read."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import did_you_mean
from mpjax.precision.policy import dtype_name
from mpjax.precision.precision import Precision
from mpjax.precision.presets import get_precision, parse_rule
from mpjax.precision.triggers import Triggers
from mpjax.typing import Json

PrecisionLike: TypeAlias = str | dict[str, Json] | Precision  # what `get_precision` reads

KINDS = {
    "fixed": "fixed:LOW or fixed:LOW:EVALUATION",
    "mixed": "mixed:BASE:GROUP=VALUE:...",
    "late": "late:LOW:HIGH:SHARE",
    "dynamic": "dynamic:LOW:HIGH or dynamic:LOW:HIGH:window=20,skips=0.3,rise=0.2,hold=3",
}


def _check_kind(kind: str, where: str) -> None:
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        raise ConfigError(
            f"{where}: unknown kind {kind!r}; {hint}write {'; '.join(KINDS.values())}"
        )


@dataclasses.dataclass(frozen=True)
class PrecisionSchedule:
    """Which Precision each step of a run is taken in; `fixed mixed late dynamic` make them.

    Args:
      kind: `fixed`, `mixed`, `late` or `dynamic`.
      precisions: what it switches between; a run begins in the first.
      evaluation: what the run is evaluated in; None leaves it to the caller.
      last: of `late`: share of the run that is taken in the second.
      steps: of `late`: length of the run, 0 while it is not known (`over` sets it).
      triggers: of `dynamic`.

    Raises:
      ConfigError: precisions that cannot follow each other, since they store optimizer state
        differently, or a value out of its range.
    """

    kind: str
    precisions: tuple[Precision, ...]
    evaluation: Precision | None = None
    last: float = 0.0
    steps: int = 0
    triggers: Triggers | None = None

    def __post_init__(self) -> None:
        _check_kind(self.kind, "precision schedule")
        count = 2 if self.kind in ("late", "dynamic") else 1
        if len(self.precisions) != count:
            raise ConfigError(
                f"precision schedule: {self.kind} takes {count} precisions,"
                f" got {len(self.precisions)}; write {KINDS[self.kind]}"
            )
        self._check_unread()
        if count == 1:
            return
        low, high = self.precisions
        if dataclasses.replace(low, name=high.name) == high:
            raise ConfigError(
                f"precision schedule: {self.kind} switches between {low.name} and {high.name},"
                " which are the same; take two that differ, or fixed"
            )
        for name in ("update", "moments", "compression"):
            was, now = (str(getattr(p, name)) for p in self.precisions)
            if was != now:
                raise ConfigError(
                    f"precision schedule: {low.name} has {name}={was} and {high.name} {name}={now};"
                    " weights and moments are carried over a switch as they are stored, so give"
                    f" both the same {name}"
                )
        if self.kind == "late" and not 0 < self.last < 1:
            raise ConfigError(
                f"precision schedule: late: the share {self.last} of the run must lie between 0"
                " and 1, such as 0.1; a run in one precision is fixed"
            )

    def _check_unread(self) -> None:
        """Refuses fields of another kind, and a dynamic schedule without triggers."""
        readers = {"last": "late", "steps": "late", "triggers": "dynamic"}
        for name, kind in readers.items():
            value = getattr(self, name)
            if self.kind != kind and value:
                raise ConfigError(
                    f"precision schedule: {self.kind} does not read {name}={brief(value)}; leave it"
                    f" out or choose {kind}"
                )
        if self.kind == "dynamic" and not isinstance(self.triggers, Triggers):
            raise ConfigError(
                f"precision schedule: dynamic has triggers={brief(self.triggers)} and would never"
                " switch; write dynamic('fp16', 'fp32') or give triggers=Triggers()"
            )

    @property
    def first(self) -> Precision:
        """The Precision of the first step."""
        return self.precisions[0]

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each precision, no two the same."""
        names = [p.name for p in self.precisions]
        return tuple(
            name if names.count(name) == 1 else f"{name}#{n}" for n, name in enumerate(names)
        )

    @property
    def window(self) -> int:
        """Steps between decisions that need evidence; 0 where none are made."""
        return self.triggers.window if self.triggers else 0

    @property
    def measured(self) -> str:
        """The format whose underflow in the backward pass is measured; empty for none."""
        if not self.triggers or not self.triggers.underflow:
            return ""
        rule = self.first.rules[-1]
        operand = rule.recipe.dgrad[0] if rule.recipe else None
        return operand.format if operand else dtype_name(rule.policy.compute_dtype)

    def over(self, steps: int) -> PrecisionSchedule:
        """Returns the schedule of a run of so many steps."""
        return dataclasses.replace(self, steps=steps) if self.kind == "late" else self

    @property
    def turn(self) -> int:
        """Steps of the run before the switch of `late`.

        Raises:
          ConfigError: the length of the run is not known, or too short to have two parts.
        """
        if not self.steps:
            raise ConfigError(
                "precision schedule: late needs the length of the run; give it with"
                " schedule.over(1000) or late(..., steps=1000)"
            )
        high = math.floor(self.last * self.steps + 0.5)
        if not 0 < high < self.steps:
            raise ConfigError(
                f"precision schedule: late: {self.last:g} of {self.steps} steps is {high} steps in"
                f" {self.labels[1]}; change the share or train longer"
            )
        return self.steps - high

    def with_options(self, **options: Any) -> PrecisionSchedule:
        """Returns the schedule with options of `get_precision` set in each of its precisions."""
        found = tuple(get_precision(p, **options) for p in self.precisions)
        return dataclasses.replace(self, precisions=found)

    def to_dict(self) -> dict[str, Json]:
        """Returns the whole of it as JSON-able values; `get_schedule` reads it."""
        return {
            "kind": self.kind,
            "precisions": [p.to_dict() for p in self.precisions],
            "evaluation": self.evaluation.to_dict() if self.evaluation else None,
            "last": self.last,
            "steps": self.steps,
            "triggers": dataclasses.asdict(self.triggers) if self.triggers else None,
        }

    def __str__(self) -> str:
        low, *rest = self.labels
        if self.kind == "late":
            line = f"{low}, then {rest[0]} in the last {self.last:.4g} of the run"
            if self.steps:
                line += f" (steps {self.turn + 1} to {self.steps})"
        elif self.kind == "dynamic":
            t = self.triggers
            line = f"{low}, and {rest[0]} while it is unstable ({str(t) or 'default triggers'})"
        else:
            rules = [str(rule) for rule in self.first.rules if rule.user]
            line = " ".join([f"{low} throughout", *(["with"] * bool(rules)), *rules])
        judged = f"; judged in {self.evaluation.name}" if self.evaluation else ""
        return f"{self.kind}: {line}{judged}"


def fixed(low: PrecisionLike, evaluation: PrecisionLike = "fp32") -> PrecisionSchedule:
    """Returns the schedule that trains in one precision and is judged in another.

    Args:
      low: anything that `get_precision` reads.
      evaluation: likewise.

    Example:
      >>> print(fixed("bf16"))
      fixed: bf16 throughout; judged in fp32
    """
    return PrecisionSchedule("fixed", (get_precision(low),), get_precision(evaluation))


def mixed(base: PrecisionLike, groups: Mapping[str, str] | Sequence[str]) -> PrecisionSchedule:
    """Returns one precision all along that differs by layer or group of parameters.

    Groups become rules, in order, the first that matches a path wins: put `norm=fp32` before
    `layers/0-1=bf16` to keep the norms of these layers in float32.

    Args:
      base: the precision of all that is in no group.
      groups: group -> VALUE of a rule, or `GROUP=VALUE` texts. A group is a word (`norm`, `head`,
        `mlp`: every path with a part that begins so), layers (`layers/0`, `layers/0-3`) or a
        pattern (`**/attention`).

    Raises:
      ConfigError: a group that cannot be read, or none.

    Example:
      >>> for rule in mixed("fp8", {"norm": "fp32", "layers/0-1": "bf16"}).first.rules[:3]:
      ...     print(rule)
      **/norm*=p=f32,c=f32,o=f32
      **/layers/0=p=f32,c=bf16,o=bf16
      **/layers/1=p=f32,c=bf16,o=bf16
    """
    if isinstance(groups, str):
        groups = [groups]
    if isinstance(groups, Mapping):
        groups = [f"{group}={value}" for group, value in groups.items()]
    if not (texts := list(groups)):
        raise ConfigError(
            "precision schedule: mixed has no group; write mixed:BASE:GROUP=VALUE, such as"
            " mixed:fp8:norm=fp32:layers/0-1=bf16"
        )
    rules = []
    for text in texts:
        group, _, value = text.partition("=")
        rules += [parse_rule(f"{pattern}={value}") for pattern in _patterns(group, text)]
    return PrecisionSchedule("mixed", (get_precision(base, rules=rules),))


def _patterns(group: str, text: str) -> list[str]:
    if layers := re.fullmatch(r"layers/(\d+)(?:-(\d+))?", group):
        first, last = int(layers[1]), int(layers[2] or layers[1])
        if last < first:
            raise ConfigError(
                f"precision schedule: group {text!r}: layers {first} to {last} are none; write the"
                f" smaller one first, layers/{last}-{first}"
            )
        return [f"**/layers/{layer}" for layer in range(first, last + 1)]
    return [group if not group or set(group) & set("*/?") else f"**/{group}*"]


def late(
    low: PrecisionLike, high: PrecisionLike, *, last: float = 0.1, steps: int = 0
) -> PrecisionSchedule:
    """Returns the schedule whose last part is taken in a higher precision.

    Args:
      low: anything that `get_precision` reads.
      high: likewise; it must store weights and optimizer state as `low` does.
      last: share of the run, rounded to whole steps.
      steps: length of the run, if it is known; `over` sets it later.

    Raises:
      ConfigError: precisions that cannot follow each other, or a share outside (0, 1).

    Example:
      >>> print(late("fp8", "bf16", last=0.1).over(1000))
      late: fp8, then bf16 in the last 0.1 of the run (steps 901 to 1000)
    """
    pair = (get_precision(low), get_precision(high))
    for name, value in (("last", last), ("steps", steps)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(
                f"precision schedule: late: {name}={brief(value)} is no number; give one"
            )
    return PrecisionSchedule("late", pair, last=float(last), steps=steps)


def dynamic(
    low: PrecisionLike, high: PrecisionLike, triggers: Triggers | None = None
) -> PrecisionSchedule:
    """Returns the schedule that trains low, goes high when training is unstable, and returns.

    Args:
      low: anything that `get_precision` reads.
      high: likewise; it must store weights and optimizer state as `low` does.
      triggers: what counts as unstable.

    Raises:
      ConfigError: precisions that cannot follow each other.

    Example:
      >>> print(dynamic("fp16", "fp32", Triggers(window=10)))
      dynamic: fp16, and fp32 while it is unstable (window=10)
    """
    pair = (get_precision(low), get_precision(high))
    return PrecisionSchedule("dynamic", pair, triggers=triggers or Triggers())


def get_schedule(value: str | Mapping[str, Json] | PrecisionSchedule) -> PrecisionSchedule:
    """Returns a schedule from a line of text, `PrecisionSchedule.to_dict` or another schedule.

    Args:
      value: `fixed:bf16`, `fixed:bf16:fp32`, `mixed:fp8:norm=fp32:layers/0-1=bf16`,
        `late:fp8:bf16:0.1`, `dynamic:fp16:fp32:window=10`. Precisions in it are names of presets or
        policies; whole Precisions are given in code.

    Raises:
      ConfigError: what cannot be read, with the nearest that can.

    Example:
      >>> schedule = get_schedule("late:fp8:bf16:0.25")
      >>> schedule == late("fp8", "bf16", last=0.25) == get_schedule(schedule.to_dict())
      True
    """
    if isinstance(value, PrecisionSchedule):
        return value
    if isinstance(value, Mapping):
        return _from_dict(value)
    if not isinstance(value, str):
        raise ConfigError(
            f"precision schedule: {brief(value)} is no text; write a kind of {' '.join(KINDS)},"
            " such as late:fp8:bf16:0.1"
        )
    kind, *parts = value.split(":")
    _check_kind(kind, f"precision schedule {value!r}")
    count = {"fixed": (1, 2), "mixed": (2, math.inf), "late": (2, 3), "dynamic": (2, 3)}[kind]
    if not count[0] <= len(parts) <= count[1] or not all(parts):
        raise ConfigError(
            f"precision schedule {value!r}: {len(parts)} parts behind {kind}, or an empty one;"
            f" write {KINDS[kind]}"
        )
    try:
        if kind == "fixed":
            return fixed(*parts)
        if kind == "mixed":
            return mixed(parts[0], parts[1:])
        if kind == "late":
            return late(*parts[:2], last=_share(value, *parts[2:]))
        return dynamic(parts[0], parts[1], Triggers.parse("".join(parts[2:])))
    except ConfigError as error:
        found = str(error)
        raise ConfigError(
            found if "precision schedule" in found else f"precision schedule {value!r}: {found}"
        ) from None


def _share(text: str, share: str = "0.1") -> float:
    try:
        return float(share)
    except ValueError:
        raise ConfigError(
            f"precision schedule {text!r}: the share {share!r} is no number; write"
            f" {KINDS['late']}, such as late:fp8:bf16:0.1"
        ) from None


def _from_dict(data: Mapping[str, Json]) -> PrecisionSchedule:
    known = {field.name for field in dataclasses.fields(PrecisionSchedule)}
    if set(data) != known:
        odd = " ".join(sorted(set(data) ^ known))
        raise ConfigError(
            f"precision schedule: its values must be exactly {' '.join(sorted(known))}; see {odd}"
        )
    fields = dict(json.loads(json.dumps(dict(data))))
    fields["precisions"] = tuple(get_precision(p) for p in fields["precisions"])
    if fields["evaluation"] is not None:
        fields["evaluation"] = get_precision(fields["evaluation"])
    if fields["triggers"] is not None:
        fields["triggers"] = Triggers(**fields["triggers"])
    return PrecisionSchedule(**fields)
