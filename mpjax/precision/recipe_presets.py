"""The recipes by name: those of papers and libraries, generic ones, and a user's own."""

from __future__ import annotations

import re

from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import did_you_mean
from mpjax.precision.recipe import Operand, Pair, Recipe


def _same(
    left: Operand, right: Operand, gradient: Operand | None = None
) -> tuple[Pair, Pair, Pair]:
    """Activations, weights and gradients quantised alike in all three products."""
    gradient = gradient or left
    return (left, right), (gradient, right), (left, gradient)


def _hybrid() -> tuple[Pair, Pair, Pair]:
    return _same(Operand("e4m3"), Operand("e4m3"), Operand("e5m2"))


def _row(format: str, **options: str) -> Operand:
    return Operand(format, "row", **options)


_RECIPES: dict[str, Recipe] = {}


def register_recipe(recipe: Recipe) -> None:
    """Makes a recipe available by its name to rules, texts and command lines.

    Args:
      recipe: with a name of its own, one word.

    Raises:
      ConfigError: no Recipe, or a name that is taken or means something already.
    """
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"recipe: {brief(recipe)} is none; register Recipe(name, ...)")
    if recipe.name in _RECIPES or _generic(recipe.name) is not None:
        raise ConfigError(f"recipe: the name {recipe.name!r} is taken; choose another")
    _RECIPES[recipe.name] = recipe


_EMULATE = re.compile(r"emulate\(([^)]*)\)")
_FIXED = re.compile(r"fixed-(q[^,]*)")


def _generic(name: str) -> Recipe | None:
    if match := _EMULATE.fullmatch(name):
        operand = Operand(match[1], "none")
        return Recipe(name, *_same(operand, operand), source="a cast of every operand, no scale")
    if match := _FIXED.fullmatch(name):
        operand = Operand(match[1], "none")
        random = Operand(match[1], "none", "stochastic")
        return Recipe(name, *_same(operand, operand, random), source="Gupta et al. 2015")
    return None


_E4M3_POWER = {"format": "e4m3", "scale_rounding": "up"}
_BLOCK = Operand(scaling="block(1x128)", **_E4M3_POWER)
_MX8, _MX4 = Operand("e4m3", "mx(32)"), Operand("e2m1", "mx(32)")
_FP4, _FP4_WEIGHT = Operand("e2m1", "nv(16)"), Operand("e2m1", "nv(16x16)")
_ROW_E4M3 = Operand(scaling="row", **_E4M3_POWER)
_INT8 = _row("int8")

for _recipe in (
    Recipe("fp8", *_hybrid(), source="Micikevicius et al. 2022, FP8 Formats; current scaling"),
    Recipe(
        "fp8-delayed", *_hybrid(), history=1024,
        source="Transformer Engine, DelayedScaling: history 1024, max, margin 0, HYBRID",
    ),
    Recipe(
        "fp8-row", *_same(_ROW_E4M3, _ROW_E4M3),
        source="torchao float8 ROWWISE: e4m3, scales rounded to powers of two",
    ),
    Recipe(
        "fp8-row-hp", (_ROW_E4M3, _ROW_E4M3), (_ROW_E4M3, _ROW_E4M3), (None, None),
        source="torchao float8 ROWWISE_WITH_GW_HP: wgrad in the compute dtype",
    ),
    Recipe(
        "fp8-block", *_same(_BLOCK, Operand(scaling="block(128x128)", **_E4M3_POWER)),
        source="DeepSeek-V3 2024, section 3.3",
    ),
    Recipe("mxfp8", *_same(_MX8, _MX8), source="OCP MX 1.0; Mishra et al. 2025 (scales up)"),
    Recipe("mxfp4", *_same(_MX4, _MX4), source="OCP MX 1.0"),
    Recipe(
        "nvfp4", *_same(_FP4, _FP4_WEIGHT, Operand("e2m1", "nv(16)", "stochastic")), hadamard=16,
        source="NVIDIA 2025, Pretraining Large Language Models with NVFP4",
    ),
    Recipe(
        "int8", *_same(_INT8, _INT8, _row("int8", rounding="stochastic")),
        source="all three products in int8, as in Xi et al. 2024 (Jetfire), with scales by row",
    ),
    Recipe(
        "int8-switchback", (_INT8, Operand("int8")), (_INT8, Operand("int8")), (None, None),
        source="Wortsman et al. 2023, Stable and Low-Precision Training (SwitchBack)",
    ),
):  # fmt: skip
    register_recipe(_recipe)


def recipe_names() -> tuple[str, ...]:
    """Returns the names of all registered recipes."""
    return tuple(_RECIPES)


def get_recipe(value: str | Recipe, where: str = "recipe") -> Recipe:
    """Returns a recipe by its name.

    Args:
      value: a registered name, `emulate(FORMAT)` (every operand cast to the format, no scale),
        `fixed-qI.F` (fixed point, gradients rounded stochastically) or a Recipe.
      where: what to call the setting in an error.

    Raises:
      ConfigError: unknown name, with the nearest that is known.

    Example:
      >>> print(get_recipe("int8-switchback"))
      Recipe int8-switchback (Wortsman et al. 2023, Stable and Low-Precision Training (SwitchBack))
        fprop  x: int8 row | W: int8 tensor
        dgrad  dy: int8 row | W: int8 tensor
        wgrad  x: compute dtype | dy: compute dtype
    """
    if isinstance(value, Recipe):
        return value
    known = isinstance(value, str)
    found = (_RECIPES.get(value) or _generic(value)) if known else None
    if found is None:
        hint = did_you_mean(value, _RECIPES, 2, 0.5) if known else ""
        raise ConfigError(
            f"{where}: unknown recipe {brief(value)}; {hint}known: {' '.join(_RECIPES)},"
            " emulate(FORMAT), fixed-qI.F; a recipe of your own needs register_recipe first"
        )
    return found
