"""Who gets which format: policies, rules and the Precision that holds them."""

from mpjax.precision.compression import Compression
from mpjax.precision.loss_scale import LossScaleSettings
from mpjax.precision.moments import Moments
from mpjax.precision.policy import (
    dtype_name,
    is_fp8,
    parse_dtype,
    parse_policy,
    policy_text,
    sum_dtype,
)
from mpjax.precision.precision import UPDATE_RULES, Precision
from mpjax.precision.presets import get_precision, parse_rule, preset_names, register_preset
from mpjax.precision.recipe import Operand, Recipe, get_recipe, recipe_names, register_recipe
from mpjax.precision.residuals import Residuals
from mpjax.precision.rule import Rule, matches
from mpjax.precision.schedule import (
    PrecisionSchedule,
    dynamic,
    fixed,
    get_schedule,
    late,
    mixed,
)
from mpjax.precision.triggers import Triggers

__all__ = [
    "UPDATE_RULES",
    "Compression",
    "LossScaleSettings",
    "Moments",
    "Operand",
    "Precision",
    "PrecisionSchedule",
    "Recipe",
    "Residuals",
    "Rule",
    "Triggers",
    "dtype_name",
    "dynamic",
    "fixed",
    "get_precision",
    "get_recipe",
    "get_schedule",
    "is_fp8",
    "late",
    "matches",
    "mixed",
    "parse_dtype",
    "parse_policy",
    "parse_rule",
    "policy_text",
    "preset_names",
    "recipe_names",
    "register_preset",
    "register_recipe",
    "sum_dtype",
]
