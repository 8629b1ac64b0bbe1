"""What autocast does where: rules by path, read from dtypes, texts and Precisions.

Of a Precision only the rules are read: loss scale, update rule, moments and the gradients' dtype
are for the optimizer, `mpjax.optim.wrap` with the same Precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.interpret.core.location import unmatched
from mpjax.precision import Precision, Recipe, get_precision
from mpjax.precision.policy import dtype_name, parse_dtype
from mpjax.precision.precision import OPTIONS
from mpjax.precision.presets import parse_rule, parse_rules
from mpjax.precision.rule import Rule, matches
from mpjax.typing import DType, DTypeLike, Settings

_COMPUTE = (jnp.float32, jnp.bfloat16, jnp.float16)


@dataclasses.dataclass(frozen=True)
class CastPolicy:
    """What happens to the equations of some paths.

    Args:
      low: dtype of the operations on the low list; None leaves every equation as it was traced,
        but for a recipe.
      output: dtype in which products leave; None for the one that they were traced in.
      recipe: how products are quantised, or None.
    """

    low: DType | None = None
    output: DType | None = None
    recipe: Recipe | None = None


UNCHANGED = CastPolicy()


@dataclasses.dataclass(frozen=True)
class CastRules:
    """Rules by path, first match wins; the last covers every path.

    Args:
      rules: with the policy that each gives.
    """

    rules: tuple[tuple[Rule, CastPolicy], ...]

    def at(self, path: str) -> CastPolicy:
        """Returns the policy of a module path; the empty path stands outside every module."""
        for rule, cast_policy in self.rules:
            if rule.pattern == "**" or (path and matches(rule.pattern, path)):
                return cast_policy
        return UNCHANGED

    @property
    def by_path(self) -> bool:
        """Whether more than the default rule is there."""
        return len(self.rules) > 1

    @property
    def quantises(self) -> bool:
        """Whether products are quantised somewhere."""
        return any(cast_policy.recipe is not None for _, cast_policy in self.rules)

    @property
    def keeps_history(self) -> bool:
        """Whether a recipe takes its scales from past steps."""
        recipes = (cast_policy.recipe for _, cast_policy in self.rules)
        return any(recipe is not None and recipe.history for recipe in recipes)

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


def _cast_policy(rule: Rule) -> CastPolicy:
    where = f"autocast: rule {str(rule)!r}"
    policy, compute = rule.policy, rule.policy.compute_dtype
    if policy.param_dtype not in (jnp.float32, compute):
        raise ConfigError(
            f"{where}: stores weights in {dtype_name(policy.param_dtype)}, and autocast stores"
            " nothing; leave p= out and cast the weights yourself"
        )
    if compute == jnp.float32:
        return UNCHANGED if rule.recipe is None else CastPolicy(recipe=rule.recipe)
    if compute not in _COMPUTE:
        raise ConfigError(
            f"{where}: autocast computes in bfloat16, float16 or float32, not in"
            f" {dtype_name(compute)}; take one of them"
        )
    return CastPolicy(jnp.dtype(compute), jnp.dtype(policy.output_dtype), rule.recipe)


def _alone(rule: str | Rule, parsed: Rule) -> Rule:
    """A rule of a function in float32: with a recipe alone, all but the products stays float32."""
    value = rule.partition("=")[2] if isinstance(rule, str) else ""
    if parsed.recipe is None or not value.startswith(("r=", "recipe=")) or "," in value:
        return parsed
    return dataclasses.replace(parsed, policy=parse_rule(f"{parsed.pattern}=fp32").policy)


def cast_rules(
    value: DTypeLike | Settings | Precision, rules: Sequence[str | Rule] = ()
) -> tuple[CastRules, str]:
    """Returns the rules that a dtype, a preset or a Precision and further rules mean.

    Args:
      value: a dtype or its name (`bf16`, `float16`, `fp32`), a policy or recipe, or a Precision.
      rules: `PATTERN=VALUE`, before those of `value`.

    Returns:
      The rules; and a line about fields of the Precision that are the optimizer's, or nothing.

    Raises:
      ConfigError: a dtype that autocast does not compute in, or a rule that it cannot follow.
    """
    own = parse_rules(rules)
    if isinstance(value, Precision):
        precision = value
    else:
        other: Any = value  # of any type, for `get_precision` to refuse
        try:
            dtype = parse_dtype(other, "autocast")
        except (ConfigError, TypeError):
            dtype = None
        if dtype is None:  # not in the handler: a mistake in it is no consequence of the other
            precision = get_precision(other)
        else:
            if dtype not in _COMPUTE:
                raise ConfigError(
                    f"autocast: it does not compute in {dtype_name(dtype)}; take bf16, fp16 or"
                    " fp32, or a recipe such as r=fp8"
                )
            name = dtype_name(dtype)
            rule = parse_rule(f"**=p=f32,c={name},o={name}")
            precision = Precision(name, (dataclasses.replace(rule, user=False),))
            if dtype == jnp.float32:
                own = tuple(_alone(*pair) for pair in zip(rules, own, strict=True))
    if precision.residuals:
        raise ConfigError(
            f"autocast: residuals={precision.residuals} is of modules that say what they keep for"
            " their backward pass: of mpjax's models, or of yours by mpjax.ops.from_saved; take"
            " residuals=none"
        )
    note, plain = "", Precision("plain", ())
    if left := [n for n in OPTIONS if getattr(precision, n) != getattr(plain, n)]:
        note = (
            f"autocast: Precision {precision.name!r} sets {' '.join(left)}, which the optimizer"
            " takes: mpjax.optim.wrap(optimizer, precision); autocast reads its rules alone"
        )
    every = (*own, *precision.rules)
    last = next((i for i, rule in enumerate(every) if rule.pattern == "**"), None)
    if last is None:
        raise ConfigError("autocast: no rule covers every path; add '**=POLICY' at the end")
    found = [(rule, _cast_policy(rule)) for rule in every[: last + 1]]
    rule, cast_policy = found[-1]
    return CastRules((*found[:-1], (dataclasses.replace(rule, user=False), cast_policy))), note
