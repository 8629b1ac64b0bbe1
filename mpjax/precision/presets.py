"""Precision presets by name."""

from __future__ import annotations

import dataclasses

from mpjax.errors import ConfigError, brief
from mpjax.precision.loss_scale import LossScaleSettings
from mpjax.precision.moments import MomentFormat, Moments
from mpjax.precision.policy import parse_policy
from mpjax.precision.precision import Precision
from mpjax.precision.recipe import Recipe
from mpjax.precision.recipe_presets import get_recipe, recipe_names
from mpjax.precision.rule import Rule

_DYNAMIC = LossScaleSettings("dynamic")
_INT8 = MomentFormat("int8")
_PRESETS: dict[str, Precision] = {}


def base_rules(*rules: tuple[str, str]) -> tuple[Rule, ...]:
    """Rules of a preset, from patterns and policies."""
    return tuple(Rule(pattern, parse_policy(text), user=False) for pattern, text in rules)


def _mixed(param: str, low: str) -> tuple[Rule, ...]:
    """Products low; softmax, norms, rotary angles, cell states, logits and loss in float32."""
    return base_rules(
        ("**/softmax", f"p=f32,c=f32,o={low}"),
        ("**/norm*", f"p=f32,c=f32,o={low}"),
        ("**/rotary", f"p=f32,c=f32,o={low}"),
        ("**/cell/state", "f32"),
        ("**/head", f"p={param},c={low},o=f32"),
        ("**/loss", "f32"),
        ("**", f"p={param},c={low},o={low}"),
    )


def _low(param: str, low: str) -> tuple[Rule, ...]:
    """Every operation low; only the mean over tokens, which the loss scale needs, is float32."""
    return base_rules(("**/loss", f"p=f32,c={low},o=f32"), ("**", f"p={param},c={low},o={low}"))


def quantised_rules(recipe: Recipe) -> tuple[Rule, ...]:
    """As bf16, with the products of the blocks quantised; head, norms and attention stay high."""
    rules = _mixed("f32", "bf16")
    return (*rules[:-1], dataclasses.replace(rules[-1], recipe=recipe))


def register_preset(precision: Precision) -> None:
    """Makes a Precision available to `get_precision` and to every command line by its name.

    Args:
      precision: with a name of its own.

    Raises:
      ConfigError: no Precision, or a name that is taken or is not one word.

    Example:
      >>> import dataclasses
      >>> from mpjax.precision import get_precision
      >>> mine = get_precision("bf16", rules=["**/mlp=r=mxfp8"])
      >>> mine = dataclasses.replace(mine, name="bf16-mxfp8-mlp")
      >>> register_preset(mine)  # doctest: +SKIP
      >>> get_precision("bf16-mxfp8-mlp").recipe("decoder/mlp/up").name  # doctest: +SKIP
      'mxfp8'
    """
    if not isinstance(precision, Precision):
        raise ConfigError(
            f"preset: {brief(precision)} is no Precision; register what get_precision"
            " returns, with a name of its own"
        )
    if precision.name in _PRESETS or not precision.name or set(" =:,") & set(precision.name):
        raise ConfigError(
            f"preset: the name {precision.name!r} is taken, empty or holds one of ' =:,';"
            " choose another"
        )
    _PRESETS[precision.name] = precision


for _preset in (
    Precision("fp32", base_rules(("**", "f32"))),
    # Mixed: Micikevicius et al. 2018; for bfloat16 Kalamkar et al. 2019 (no loss scale).
    Precision("bf16", _mixed("f32", "bf16")),
    Precision("fp16", _mixed("f32", "f16"), _DYNAMIC),
    # Low-precision: every operation low, float32 weights and update.
    Precision("low-bf16", _low("f32", "bf16")),
    Precision("low-fp16", _low("f32", "f16"), _DYNAMIC),
    # Pure: weights too are stored low and updated with rounding to nearest.
    Precision("pure-bf16", _low("bf16", "bf16"), update="nearest"),
    Precision("pure-fp16", _low("f16", "f16"), _DYNAMIC, update="nearest"),
    # Apex's optimisation levels (O1 casts inside functions, as mpjax.autocast does). O2 keeps batch
    # norms, which we read as all norms, in float32 and float32 master weights; O3 is all float16.
    Precision("O0", base_rules(("**", "f32"))),
    Precision("O2", _mixed("f16", "f16"), _DYNAMIC, update="master"),
    Precision("O3", _low("f16", "f16"), update="nearest"),
    # Stochastic rounding: Zamirai et al. 2020, Revisiting BFloat16 Training; Kahan likewise.
    Precision("pure-bf16-sr", _low("bf16", "bf16"), update="stochastic"),
    Precision("pure-bf16-kahan", _low("bf16", "bf16"), update="kahan"),
    # Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization: embeddings stay 32-bit.
    Precision(
        "adam8bit",
        _mixed("f32", "bf16"),
        moments=Moments(_INT8, _INT8, keep=("**/embed",), user=False),
    ),
    # One for each recipe, whose source the table prints.
    *(Precision(name, quantised_rules(get_recipe(name))) for name in recipe_names()),
):
    register_preset(_preset)


def preset_names() -> tuple[str, ...]:
    """Returns the names of all presets."""
    return tuple(_PRESETS)


def find_preset(name: str) -> Precision | None:
    """Returns a preset by its name, None where there is none."""
    return _PRESETS.get(name)
