"""Reading a schedule of Precision: from a line of text, a dict or another schedule."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from mpjax.errors import ConfigError, brief
from mpjax.precision.reading import get_precision
from mpjax.precision.schedule import KINDS, PrecisionSchedule, dynamic, fixed, late, mixed, unknown
from mpjax.precision.triggers import Triggers


def get_schedule(value: str | Mapping[str, Any] | PrecisionSchedule) -> PrecisionSchedule:
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
    if not isinstance(value, str | Mapping):
        raise ConfigError(
            f"precision schedule: {brief(value)} is no text; write a kind of {' '.join(KINDS)},"
            " such as late:fp8:bf16:0.1"
        )
    if not isinstance(value, str):
        return _from_dict(value)
    kind, *parts = value.split(":")
    if kind not in KINDS:
        raise ConfigError(f"precision schedule {value!r}: {unknown(kind)}")
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


def _from_dict(data: Mapping[str, Any]) -> PrecisionSchedule:
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
