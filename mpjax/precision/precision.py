"""Precision: the one object that says which format each tensor gets."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import jmp
from rich import box
from rich.console import Console
from rich.table import Table

from mpjax.errors import ConfigError, brief
from mpjax.precision.compression import Compression
from mpjax.precision.loss_scale import LossScaleSettings
from mpjax.precision.moments import Moments
from mpjax.precision.policy import dtype_name, is_fp8, parse_dtype
from mpjax.precision.recipe import Recipe
from mpjax.precision.residuals import Residuals
from mpjax.precision.rule import Rule, matches, nearest, spellings
from mpjax.typing import DTypeLike, Json, Settings

OPTIONS = ("loss_scale", "update", "moments", "gradient_dtype", "compression", "residuals")
UPDATE_RULES = ("none", "master", "nearest", "stochastic", "kahan")


@dataclasses.dataclass(frozen=True)
class Precision:
    """Which format each tensor is stored, computed, updated and communicated in.

    Args:
      name: the preset or policy that it began with.
      rules: path pattern -> policy and recipe, first match wins; the user's stand before the
        preset's.
      loss_scale: settings of the loss scale.
      update: how a low-precision weight takes its update: `none` (weights are float32), `master`
        (float32 copy in the optimizer state), `nearest` (rounded to nearest even), `stochastic`
        (rounded at random, so that the mean is right) or `kahan` (what rounding lost is kept low
        in the optimizer state).
      moments: storage dtypes of the optimizer state.
      gradient_dtype: dtype in which weight gradients leave their product and are summed over
        replicas.
      compression: what replicas of the mesh axis `data` send each other of their gradients.
      residuals: how what the forward pass leaves for the backward pass is kept.

    Raises:
      ConfigError: values that cannot be read or do not fit each other.

    Example:
      >>> from mpjax.precision import get_precision
      >>> get_precision("bf16", rules=["**/head=fp32"]).layout(["decoder/head"])
      {'decoder/head': 'p=f32,c=f32,o=f32'}

    References:
      Micikevicius et al. 2018, Mixed Precision Training.
    """

    name: str
    rules: tuple[Rule, ...]
    loss_scale: LossScaleSettings = LossScaleSettings()
    update: str = "none"
    moments: Moments = Moments()
    gradient_dtype: DTypeLike = jnp.float32
    compression: Compression = Compression()
    residuals: Residuals = Residuals()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ConfigError(f"precision: the name {brief(self.name)} is not one word")
        rules = self.rules
        if not isinstance(rules, list | tuple) or not all(isinstance(r, Rule) for r in rules):
            raise ConfigError(
                f"precision: rules={brief(rules)}; give a tuple of Rule, or write"
                " get_precision('bf16', rules=['**/norm*=fp32'])"
            )
        options = {name: getattr(self, name) for name in OPTIONS}
        for name in (name for name, value in options.items() if value is None):
            raise ConfigError(f"{name}: None stands in its place; leave it out for the default")
        for name, value in ({"rules": tuple(rules)} | parse_options(options)).items():
            object.__setattr__(self, name, value)
        if self.name.split() != [self.name] or self.name.startswith("{"):
            raise ConfigError(f"precision: the name {self.name!r} is not one word; choose another")
        if self.update not in UPDATE_RULES:
            raise ConfigError(
                f"update: unknown rule {self.update!r}; known: {' '.join(UPDATE_RULES)}"
            )
        quantised = [rule for rule in self.rules if rule.recipe]
        delayed = [rule for rule in quantised if rule.recipe and rule.recipe.history]
        if delayed and self.loss_scale.kind == "leaf":
            raise ConfigError(
                f"loss_scale: leaf pulls gradients at several scales, and rule {delayed[0]} keeps"
                " their amax at one; take loss_scale=dynamic or a recipe with current scaling"
            )
        if quantised and self.gradient_dtype != jnp.float32:
            raise ConfigError(
                f"gradient_dtype: {dtype_name(self.gradient_dtype)} with rule {quantised[0]}:"
                " quantised products sum their weight gradients in float32; set gradient_dtype=f32"
            )
        low = [
            rule
            for rule in self.rules
            if (dtype := rule.policy.param_dtype) in (jnp.bfloat16, jnp.float16) or is_fp8(dtype)
        ]
        if low and self.update == "none":
            raise ConfigError(
                f"update: rule {low[0]} stores weights in {dtype_name(low[0].policy.param_dtype)},"
                " which needs an update rule; set update=master (float32 copy) or update=nearest,"
                " stochastic or kahan"
            )

    @functools.cache  # noqa: B019 - frozen and few: one entry per path and Precision
    def _first_match(self, path: str) -> int | None:
        """The index of the first rule that matches a path."""
        return next((n for n, rule in enumerate(self.rules) if matches(rule.pattern, path)), None)

    def _rule(self, path: str) -> Rule:
        if (number := self._first_match(path)) is None:
            raise ConfigError(
                f"{path}: no rule of Precision {self.name!r} covers this path; its patterns are"
                f" {' '.join(rule.pattern for rule in self.rules) or '(none)'}; add '**=POLICY'"
            )
        return self.rules[number]

    def policy(self, path: str) -> jmp.Policy:
        """Returns the policy of a module or parameter path.

        Raises:
          ConfigError: no rule covers the path.
        """
        return self._rule(path).policy

    def recipe(self, path: str) -> Recipe | None:
        """Returns the recipe of a module's matrix product, None where it is not quantised."""
        number = self._first_match(path)
        return None if number is None else self.rules[number].recipe

    def check(
        self,
        paths: Iterable[str],
        weights: Iterable[str] = (),
        products: Iterable[str] | None = None,
    ) -> None:
        """Checks the rules against all paths of a model.

        Args:
          paths: all paths: of modules, of operations in them and of weights.
          weights: those of them that are weights, module path and leaf.
          products: those whose product a recipe can quantise; None does not check recipes.

        Raises:
          ConfigError: a path that no rule covers, a user rule that decides no path, one that
            names weights only, which are stored and not computed, and gives compute or output,
            or one that gives a recipe to paths without a product.
        """
        products = None if products is None else list(products)
        paths, weights = list(paths), set(weights)
        for path in paths:
            self.policy(path)  # raises where no rule covers the path
        for number, rule in enumerate(self.rules):
            matched = [path for path in paths if matches(rule.pattern, path)]
            if not rule.user:
                continue
            if not matched:
                raise ConfigError(
                    f"rule {str(rule)!r}: matches no path of the model;"
                    f" {nearest(rule.pattern, paths)}"
                )
            p = rule.policy
            follows = jnp.float32 if is_fp8(p.param_dtype) else p.param_dtype
            if weights.issuperset(matched) and not follows == p.compute_dtype == p.output_dtype:
                raise ConfigError(
                    f"rule {str(rule)!r}: names weights only, for which only p= counts; write"
                    f" {rule.pattern}=p={dtype_name(p.param_dtype)}, or name their module to set"
                    " c= and o="
                )
            if (
                rule.recipe is not None
                and products is not None
                and not any(matches(rule.pattern, path) for path in products)
            ):
                shown = sorted({f"**/{path.split('/')[-1]}" for path in products})
                modules = [path for path in matched if path not in weights] or matched
                raise ConfigError(
                    f"rule {str(rule)!r}: recipe {rule.recipe.name!r} quantises matrix products,"
                    f" and {spellings(modules[0])[-1]} has none; it can be given to"
                    f" {' '.join(shown)}"
                )
            deciding = [n for path in matched if (n := self._first_match(path)) is not None]
            if number not in deciding:
                raise ConfigError(
                    f"rule {str(rule)!r}: decides no path, because"
                    f" {str(self.rules[deciding[0]])!r} before it matches first; move it up or"
                    " drop it"
                )

    def layout(self, paths: Iterable[str]) -> dict[str, str]:
        """Returns path -> policy and recipe, layers of equal ones written once.

        Args:
          paths: of modules or parameters, a list of texts.

        Raises:
          ConfigError: no list of texts, or no rule covers a path.
        """
        found: dict[str, str] = {}
        texts = isinstance(paths, Iterable) and all(isinstance(path, str) for path in paths)
        if isinstance(paths, str) or not texts:
            raise ConfigError(f"layout: {brief(paths)} is no list of paths; write ['decoder/head']")
        for path in paths:
            bare, text = spellings(path)[-1], self._rule(path).value
            found[bare if found.get(bare, text) == text else path] = text
        return found

    def to_dict(self) -> dict[str, Json]:
        """Returns the whole of it as JSON-able values; `get_precision` reads it."""
        return {
            "name": self.name,
            "rules": [[r.pattern, r.value, r.user] for r in self.rules],
            "loss_scale": str(self.loss_scale),
            "update": self.update,
            "moments": str(self.moments),
            "gradient_dtype": dtype_name(self.gradient_dtype),
            "compression": str(self.compression),
            "residuals": str(self.residuals),
        }

    def to_json(self) -> str:
        """Returns `to_dict` as one line of JSON; `get_precision` reads it."""
        return json.dumps(self.to_dict())

    def to_text(self) -> str:
        """Returns the whole of it as one line of blank-separated words.

        `rule:` is a user's rule, `base:` one of the preset's, or none; `get_precision` reads it.
        """
        words = [self.name]
        words += [f"{'rule' if rule.user else 'base'}:{rule}" for rule in self.rules]
        if all(rule.user for rule in self.rules):
            words.append("base:")
        fields = self.to_dict()
        words += [f"{key}={fields[key]}" for key in OPTIONS]
        return " ".join(words)

    def __str__(self) -> str:
        table = Table(box=box.SIMPLE, title=f"Precision {self.name}", title_justify="left")
        recipes = {rule.recipe.name: rule.recipe for rule in self.rules if rule.recipe}
        columns = "pattern", "param", "compute", "output", *["recipe"] * bool(recipes), "from"
        for column in columns:
            table.add_column(column, no_wrap=True)
        for rule in self.rules:
            p = rule.policy
            dtypes = [dtype_name(d) for d in (p.param_dtype, p.compute_dtype, p.output_dtype)]
            if recipes:
                dtypes.append("" if rule.recipe is None else rule.recipe.name)
            table.add_row(rule.pattern, *dtypes, "user" if rule.user else "preset")
        widest = max((len(rule.pattern) for rule in self.rules), default=0)
        # Plain text wherever it is printed: no HTML in a notebook, no colour codes in a file.
        console = Console(
            file=io.StringIO(), width=100 + widest, force_jupyter=False, force_terminal=False
        )
        console.print(table)
        fields = self.to_dict()
        rest = " · ".join(f"{key.replace('_', ' ')} {fields[key]}" for key in OPTIONS)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        shown = [f"  {line}" for recipe in recipes.values() for line in str(recipe).splitlines()]
        table_lines = [line.rstrip() for line in lines if line.strip()]
        return "\n".join([*table_lines, "  " + rest, *shown])


def _moments(value: Any) -> Moments:
    if isinstance(value, str):
        return Moments.parse(value)
    return value if isinstance(value, Moments) else Moments(value, value)  # a dtype


def _update(value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"update: {brief(value)} is no rule; known: {' '.join(UPDATE_RULES)}")
    return value


def parse_options(values: Mapping[str, object]) -> Settings:
    """Reads the fields of a Precision beside its rules; those that are None are left out."""
    parse: dict[str, Callable[[Any], Any]] = {
        "loss_scale": LossScaleSettings.parse,
        "update": _update,
        "moments": _moments,
        "gradient_dtype": lambda v: parse_dtype(v, "gradient_dtype"),
        "compression": Compression.parse,
        "residuals": Residuals.parse,
    }
    return {key: parse[key](values[key]) for key in OPTIONS if values.get(key) is not None}
