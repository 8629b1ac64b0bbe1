"""Recipes: how a product and its two backward products are quantised; registered by name."""

from __future__ import annotations

import dataclasses
import re

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.formats import ROUNDINGS, Format, Scaling, check_scaling
from mpjax.formats.checks import did_you_mean


@dataclasses.dataclass(frozen=True)
class Operand:
    """How one operand of a product is quantised.

    Args:
      format: of its values, such as `e4m3`, `int8`, `e3m4`.
      scaling: who shares a scale: `none`, `tensor`, `row`, `block(1x128)`, `mx(32)`, `nv(16)`;
        rows and blocks lie along the axis that the product sums over.
      rounding: of its values.
      scale_rounding: `none`, or to a power of two, `up` or `down`; by default `up` for mx, else
        `none`.

    Raises:
      ConfigError: names that are unknown or do not fit each other.

    Example:
      >>> str(Operand("e4m3", "block(1x128)", scale_rounding="up"))
      'e4m3 block(1x128), scale 2^n up'
    """

    format: str
    scaling: str = "tensor"
    rounding: str = "nearest"
    scale_rounding: str | None = None

    def __post_init__(self) -> None:
        format, scaling = Format.of(self.format), Scaling.parse(self.scaling)
        object.__setattr__(self, "format", format.name)
        object.__setattr__(self, "scaling", str(scaling))
        check_scaling(format, scaling, self.scales_rounded, f"recipe: {self.format}")
        if self.rounding not in ROUNDINGS:
            raise ConfigError(
                f"recipe: unknown rounding {brief(self.rounding)}; known: {' '.join(ROUNDINGS)}"
            )

    @property
    def scales_rounded(self) -> str:
        """How its scales are rounded."""
        default = Scaling.parse(self.scaling).default_rounding
        return default if self.scale_rounding is None else self.scale_rounding

    def __str__(self) -> str:
        parts = [f"{self.format} {self.scaling}" if self.scaling != "none" else self.format]
        if self.rounding != "nearest":
            parts.append(self.rounding)
        if self.scales_rounded != "none":
            parts.append(f"scale 2^n {self.scales_rounded}")
        return ", ".join(parts)


Pair = tuple[Operand | None, Operand | None]  # None stays in the compute dtype


@dataclasses.dataclass(frozen=True)
class Recipe:
    r"""How the product $y = x W$ and its two backward products are quantised.

    $$y = Q(x) Q(W), \qquad dx = Q(dy) Q(W^T), \qquad dW = Q(x^T) Q(dy)$$

    Each operand of each product is quantised from high precision, along the axis that this product
    sums over. Products accumulate in float32 (integers in int32).

    Args:
      name: one word; rules, texts and saved runs know the recipe by it.
      fprop: operands x and W.
      dgrad: operands dy and W.
      wgrad: operands x and dy.
      hadamard: size of the random Hadamard transform of both operands of wgrad along the tokens,
        a power of two; 0 for none.
      history: steps of the amax history from which delayed scaling takes its scale; 0 takes it
        from the current tensor.
      margin: of delayed scaling: scales are 2^margin larger than the history asks for.
      accumulate: format of the running sum; other than `float32`, it is rounded to the format
        after each `chunk` summands.
      chunk: summands between two such roundings.
      source: where the recipe comes from.

    Raises:
      ConfigError: settings out of their range, or delayed scaling of anything but whole tensors.

    Example:
      >>> Recipe("mine", *(3 * [(Operand("e3m4"), Operand("e3m4"))])).uses_key
      False
    """

    name: str
    fprop: Pair
    dgrad: Pair
    wgrad: Pair
    hadamard: int = 0
    history: int = 0
    margin: int = 0
    accumulate: str = "float32"
    chunk: int = 128
    source: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        where = f"recipe {brief(self.name)}"
        for product in ("fprop", "dgrad", "wgrad"):  # lists too, as from JSON
            pair = getattr(self, product)
            listed = isinstance(pair, tuple | list) and len(pair) == 2
            if not listed or not all(o is None or isinstance(o, Operand) for o in pair):
                raise ConfigError(
                    f"{where}: {product}={brief(pair)}; write a pair of Operands, such as"
                    " (Operand('e4m3'), None), with None for the compute dtype"
                )
            object.__setattr__(self, product, tuple(pair))
        for field in ("hadamard", "history", "margin", "chunk"):
            value = getattr(self, field)
            if not is_whole(value):
                raise ConfigError(f"{where}: {field}={brief(value)} is no whole number; give one")
        if not isinstance(self.name, str) or not self.name or set(" =:,") & set(self.name):
            raise ConfigError(f"{where}: the name is empty or holds one of ' =:,'; choose another")
        if self.hadamard < 0 or self.hadamard & (self.hadamard - 1):
            raise ConfigError(f"{where}: hadamard={self.hadamard} is not a power of two; take 16")
        if self.history < 0 or self.chunk < 1:
            raise ConfigError(
                f"{where}: history={self.history}, chunk={self.chunk}; history is 0 or more and"
                " chunk at least 1"
            )
        self._check_sums(where)
        self._check_margin(where)
        delayed = [operand for operand in self.operands if operand.scaling != "tensor"]
        if self.history and (delayed or None in (*self.fprop, *self.dgrad, *self.wgrad)):
            raise ConfigError(
                f"{where}: delayed scaling (history={self.history}) needs tensor scaling of every"
                " operand; set scaling=tensor or history=0"
            )

    def _check_sums(self, where: str) -> None:
        format = Format.of(self.accumulate)
        object.__setattr__(self, "accumulate", format.name)
        holds_float32 = format.mantissa_bits >= 23 and format.exponent_bits >= 8
        if format.kind == "power" or (holds_float32 and format.name != "float32"):
            raise ConfigError(
                f"{where}: accumulate={format.name} rounds no running sum of float32; take a"
                " narrower format with zero and a sign, such as e6m9, or leave it out"
            )
        if format.name == "float32" and self.chunk != 128:
            raise ConfigError(
                f"{where}: chunk={self.chunk} is of sums that are rounded, not of float32 ones;"
                " give accumulate too, such as accumulate='e6m9', or leave chunk out"
            )

    def _check_margin(self, where: str) -> None:
        if self.margin and not self.history:
            raise ConfigError(
                f"{where}: margin={self.margin} is of delayed scaling, and history=0 takes scales"
                " from the current tensor; give history too, such as history=1024, or leave margin"
                " out"
            )
        if abs(self.margin) > 126:
            raise ConfigError(
                f"{where}: margin={self.margin}: 2^margin is no float32; give one of -126 .. 126,"
                " such as 0"
            )

    @property
    def operands(self) -> tuple[Operand, ...]:
        """All operands that are quantised."""
        return tuple(o for o in (*self.fprop, *self.dgrad, *self.wgrad) if o)

    @property
    def uses_key(self) -> bool:
        """Whether it draws random numbers."""
        return self.forward_uses_key or self.backward_uses_key

    @property
    def forward_uses_key(self) -> bool:
        """Whether the forward product draws random numbers."""
        return any(o and o.rounding == "stochastic" for o in self.fprop)

    @property
    def backward_uses_key(self) -> bool:
        """Whether the backward products draw random numbers."""
        back = (*self.dgrad, *self.wgrad)
        return self.hadamard > 0 or any(o and o.rounding == "stochastic" for o in back)

    def rows(self) -> list[tuple[str, str, str]]:
        """Returns (product, left operand, right operand) as texts."""
        names = (("fprop", "x", "W"), ("dgrad", "dy", "W"), ("wgrad", "x", "dy"))
        pairs = (self.fprop, self.dgrad, self.wgrad)
        return [
            (name, f"{left}: {a or 'compute dtype'}", f"{right}: {b or 'compute dtype'}")
            for (name, left, right), (a, b) in zip(names, pairs, strict=True)
        ]

    def __str__(self) -> str:
        extra = []
        if self.hadamard:
            extra.append(f"wgrad through a random Hadamard transform of {self.hadamard}")
        if self.history:
            extra.append(f"scales from the last {self.history} steps, margin {self.margin}")
        if self.accumulate != "float32":
            extra.append(f"sums rounded to {self.accumulate} every {self.chunk} summands")
        lines = [f"Recipe {self.name}" + (f" ({self.source})" if self.source else "")]
        lines += [f"  {name}  {left} | {right}" for name, left, right in self.rows()]
        return "\n".join([*lines, *(f"  {line}" for line in extra)])


def _same(
    left: Operand, right: Operand, gradient: Operand | None = None
) -> tuple[Pair, Pair, Pair]:
    """Activations, weights and gradients quantised alike in all three products."""
    gradient = gradient or left
    return (left, right), (gradient, right), (left, gradient)


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


_HYBRID = _same(Operand("e4m3"), Operand("e4m3"), Operand("e5m2"))
_BLOCK = Operand("e4m3", "block(1x128)", scale_rounding="up")
_BLOCK_WEIGHT = Operand("e4m3", "block(128x128)", scale_rounding="up")
_MX8, _MX4 = Operand("e4m3", "mx(32)"), Operand("e2m1", "mx(32)")
_FP4, _FP4_WEIGHT = Operand("e2m1", "nv(16)"), Operand("e2m1", "nv(16x16)")
_ROW_E4M3 = Operand("e4m3", "row", scale_rounding="up")
_INT8 = Operand("int8", "row")

for _recipe in (
    Recipe("fp8", *_HYBRID, source="Micikevicius et al. 2022, FP8 Formats; current scaling"),
    Recipe(
        "fp8-delayed", *_HYBRID, history=1024,
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
        "fp8-block", *_same(_BLOCK, _BLOCK_WEIGHT),
        source="DeepSeek-V3 2024, section 3.3",
    ),
    Recipe("mxfp8", *_same(_MX8, _MX8), source="OCP MX 1.0; Mishra et al. 2025 (scales up)"),
    Recipe("mxfp4", *_same(_MX4, _MX4), source="OCP MX 1.0"),
    Recipe(
        "nvfp4", *_same(_FP4, _FP4_WEIGHT, Operand("e2m1", "nv(16)", "stochastic")), hadamard=16,
        source="NVIDIA 2025, Pretraining Large Language Models with NVFP4",
    ),
    Recipe(
        "int8", *_same(_INT8, _INT8, Operand("int8", "row", "stochastic")),
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
    found = (_RECIPES.get(value) or _generic(value)) if isinstance(value, str) else None
    if found is None:
        hint = did_you_mean(value, _RECIPES, 2, 0.5) if isinstance(value, str) else ""
        raise ConfigError(
            f"{where}: unknown recipe {brief(value)}; {hint}known: {' '.join(_RECIPES)},"
            " emulate(FORMAT), fixed-qI.F; a recipe of your own needs register_recipe first"
        )
    return found
