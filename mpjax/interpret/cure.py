"""The smallest change of precision that removes a fault, found by trying each in turn."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mpjax.interpret.culprit import Culprit
from mpjax.interpret.place import Place
from mpjax.interpret.reach import Reach
from mpjax.interpret.sites import Key
from mpjax.interpret.trace import Program
from mpjax.interpret.watch import Watch, any_low

NONE = "none: the value is not finite in float32 either"
_LOSS_SCALE = re.compile(r"(loss_scale|scale|\])\.value$|loss_scale$")


def find_cure(program: Program, culprit: Culprit) -> str:
    """Returns the smallest change that removes a fault, in words.

    Tried in this order: the operation in float32; a loss scale lower by a power of two, where an
    argument is one; its module in float32, then the modules around it; everything in float32.

    Args:
      program: what runs.
      culprit: what broke in it.
    """
    key, place = culprit.found.key, culprit.watch.sites[culprit.found.key].place
    low = any_low(culprit.watch.sites)
    if low and _cured(program, culprit, lambda k, _: k == key):
        return "this operation in float32"
    if lower := _lower_scale(program, culprit):
        return lower
    if not low:
        return NONE
    if not _cured(program, culprit, lambda *_: True):
        return NONE
    for path in _around(place.path):
        if _cured(program, culprit, lambda _, p, path=path: _inside(p, path)):  # type: ignore[misc]
            return f"{path} in float32"
    return "all of it in float32"


def _cured(program: Program, culprit: Culprit, wide: Callable[[Key, Place], bool]) -> bool:
    return _is_clean(Watch(program.closed, wide=wide), program.args, culprit)


def _is_clean(watch: Watch, args: Sequence[Any], culprit: Culprit) -> bool:
    records, _ = watch(args)
    bad = {f.key for f in watch.found(records)}
    left = bad - culprit.others
    if not culprit.reached or (len(watch.closed.jaxpr.eqns),) in left:  # an output does not fit
        return not left
    # An infinity may remain that nobody feels, as in 1 / (1 + inf).
    return not Reach(watch.closed, left, watch.sites, bad).felt


def _around(path: str) -> Iterator[str]:
    parts = path.split("/") if path else []
    for count in range(len(parts), 0, -1):
        yield "/".join(parts[:count])


def _inside(place: Place, path: str) -> bool:
    return place.path == path or place.path.startswith(f"{path}/")


def _lower_scale(program: Program, culprit: Culprit) -> str:
    """A loss scale lower by the smallest power of two that removes the fault; empty if none."""
    scales = [
        (i, float(np.max(np.asarray(x))))
        for i, (name, x) in enumerate(zip(program.names, program.args, strict=True))
        if _LOSS_SCALE.search(name) and jnp.issubdtype(x.dtype, jnp.floating)
    ]
    largest = max((value for _, value in scales), default=0.0)
    if not (math.isfinite(largest) and largest >= 2):
        return ""

    def clean(power: int) -> bool:
        args = list(program.args)
        for index, _ in scales:
            # In its dtype and on its devices, as the compiled program expects it.
            args[index] = program.args[index] * jnp.asarray(2.0**-power, args[index].dtype)
        return _is_clean(culprit.watch, args, culprit)

    most = int(math.log2(largest))
    if not clean(most):
        return ""
    good, bad = most, 0
    while good - bad > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if clean(middle) else (good, middle)
    return f"a loss scale 2^{good} lower: {largest:g} -> {largest / 2**good:g}"
