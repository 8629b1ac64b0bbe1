"""One autocast of one function call: the jaxprs in it, evaluated with casts put in."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import jax
from jax.extend.core import ClosedJaxpr

from mpjax.interpret.autocast.cotangents import Sides, sides
from mpjax.interpret.autocast.evaluate import CastScope
from mpjax.interpret.autocast.rules import CastPolicy, CastRules
from mpjax.interpret.core.control_flow import Rebind
from mpjax.interpret.core.location import Location
from mpjax.interpret.core.op_lists import Lists
from mpjax.interpret.core.retrace import Bounds, Result
from mpjax.interpret.core.walk import walk
from mpjax.typing import Array, Key

_log = logging.getLogger("mpjax.interpret")


class CastInterpreter:
    """One autocast of one function call.

    Args:
      cast_rules: what happens where.
      lists: which operations run low.
      said: what was logged already; each line is logged once.
      key: for recipes that draw random numbers.
    """

    def __init__(
        self,
        cast_rules: CastRules,
        lists: Lists,
        said: set[str] | None = None,
        key: Key | None = None,
    ) -> None:
        self.cast_rules, self.lists = cast_rules, lists
        self._said = set() if said is None else said
        self._key, self._drawn = key, 0
        self.paths: dict[str, None] = {}
        self.rebind = Rebind()
        self.gradients: dict[int, Sides] = {}
        self._rules: list[ClosedJaxpr] = []  # held, so that the ids of their equations stay theirs

    def say(self, line: str) -> None:
        """Logs a line, once."""
        if line not in self._said:
            self._said.add(line)
            _log.warning("%s", line)

    def draw(self, cast_policy: CastPolicy) -> Key | None:
        """A key of its own for each product whose recipe draws; None without one."""
        if self._key is None or cast_policy.recipe is None or not cast_policy.recipe.uses_key:
            return None
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn)

    def learn(self, rule: ClosedJaxpr, residuals: int) -> None:
        """Finds the gradients in a backward rule, whose cotangents stand behind its residuals."""
        if self.cast_rules.quantises:
            self._rules.append(rule)
            self.gradients |= sides(rule, residuals)

    def evaluate(
        self,
        closed: ClosedJaxpr,
        args: Sequence[Array],
        weak: Bounds,
        outer: Location,
        lists: Lists | None = None,
    ) -> Result:
        """Evaluates a jaxpr; `weak` has the bounds of its inputs that are weak constants."""
        scope = CastScope(self, closed, args, weak, outer, lists or self.lists)
        outs = walk(closed, args, scope.visit, outer, lines=False)
        return Result(outs, {}, [scope.weak.bound(atom) for atom in closed.jaxpr.outvars])
