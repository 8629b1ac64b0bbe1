"""What autocast does where: rules by path, read from dtypes, texts and Precisions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.interpret.place import unmatched
from mpjax.precision import Precision, Recipe, get_precision
from mpjax.precision.dtypes import dtype_name, parse_dtype
from mpjax.precision.reading import parse_rule, parse_rules
from mpjax.precision.rule import Rule, matches

_LOW = (jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class Region:
    """What happens to the equations of some paths.

    Args:
      low: dtype of the operations on the low list; None leaves every equation as it was traced.
      output: dtype in which products leave.
      recipe: how products are quantised, or None.
    """

    low: Any = None
    output: Any = None
    recipe: Recipe | None = None


UNTOUCHED = Region()


@dataclasses.dataclass(frozen=True)
class Regions:
    """Rules by path, first match wins; the last covers every path.

    Args:
      rules: with the region that each gives.
    """

    rules: tuple[tuple[Rule, Region], ...]

    def at(self, path: str) -> Region:
        """Returns the region of a module path; the empty path stands outside every module."""
        for rule, region in self.rules:
            if rule.pattern == "**" or (path and matches(rule.pattern, path)):
                return region
        return UNTOUCHED

    @property
    def by_path(self) -> bool:
        """Whether more than the default rule is there."""
        return len(self.rules) > 1

    def check(self, paths: Sequence[str]) -> None:
        """Checks the user's rules against all paths of a function.

        Raises:
          ConfigError: a rule that matches none of them.
        """
        for rule, _ in self.rules:
            if rule.user and not any(matches(rule.pattern, path) for path in paths):
                raise ConfigError(
                    f"autocast: rule {str(rule)!r} matches no path of the function;"
                    f" {unmatched(rule.pattern, paths)}"
                )


def _region(rule: Rule, where: str) -> Region:
    policy = rule.policy
    compute = policy.compute_dtype
    if policy.param_dtype != jnp.float32 and not (policy.param_dtype == compute):
        raise ConfigError(
            f"{where}: stores weights in {dtype_name(policy.param_dtype)}, and autocast stores"
            " nothing; leave p= out and cast the weights yourself"
        )
    if compute == jnp.float32:
        return UNTOUCHED
    if compute not in _LOW:
        raise ConfigError(
            f"{where}: autocast computes in bfloat16, float16 or float32, not in"
            f" {dtype_name(compute)}; take one of them"
        )
    return Region(jnp.dtype(compute), jnp.dtype(policy.output_dtype), rule.recipe)


def _refused(precision: Precision) -> list[str]:
    plain = Precision("plain", ())
    names = ("loss_scale", "update", "moments", "gradient_dtype")
    return [name for name in names if getattr(precision, name) != getattr(plain, name)]


def regions(value: Any, rules: Sequence[str | Rule] = ()) -> Regions:
    """Returns the regions that a dtype, a preset or a Precision and further rules mean.

    Args:
      value: a dtype or its name (`bf16`, `float16`), a policy or recipe, or a Precision.
      rules: `PATTERN=VALUE`, before those of `value`.

    Raises:
      ConfigError: fields of a Precision that a function alone cannot honour, or a dtype that
        autocast does not compute in.
    """
    mine = parse_rules(rules)
    if isinstance(value, Precision):
        precision = value
    else:
        try:
            dtype = parse_dtype(value, "autocast")
        except (ConfigError, TypeError):
            dtype = None
        if dtype is None:  # not in the handler: a mistake in it is no consequence of the other
            precision = get_precision(value)
        else:
            if dtype not in _LOW:
                raise ConfigError(
                    f"autocast: {dtype_name(dtype)} is not low; take bf16 or fp16, or leave"
                    " autocast out"
                )
            name = dtype_name(dtype)
            precision = Precision(name, (parse_rule(f"**=p=f32,c={name},o={name}"),))
            precision = dataclasses.replace(
                precision, rules=(dataclasses.replace(precision.rules[0], user=False),)
            )
    refused = _refused(precision)
    if refused:
        raise ConfigError(
            f"autocast: Precision {precision.name!r} sets {' '.join(refused)}, which a function"
            " alone cannot honour; pass a dtype (bf16, fp16) or a policy here, and the rest to"
            " mpjax.optim.wrap"
        )
    every = (*mine, *precision.rules)
    last = next((i for i, rule in enumerate(every) if rule.pattern == "**"), None)
    if last is None:
        raise ConfigError("autocast: no rule covers every path; add '**=POLICY' at the end")
    found = [(rule, _region(rule, f"autocast: rule {str(rule)!r}")) for rule in every[: last + 1]]
    rule, region = found[-1]
    return Regions((*found[:-1], (dataclasses.replace(rule, user=False), region)))
