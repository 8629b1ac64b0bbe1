"""Who gets which format: policies, rules and the Precision that holds them."""

from mpjax.precision.dtypes import dtype_name, parse_dtype, wider
from mpjax.precision.loss_scale import LossScaleSettings
from mpjax.precision.moments import Moments
from mpjax.precision.policy import parse_policy, policy_text
from mpjax.precision.precision import UPDATE_RULES, Precision
from mpjax.precision.presets import get_precision, parse_rule, preset_names, register_preset
from mpjax.precision.rule import Rule, matches

__all__ = [
    "UPDATE_RULES",
    "LossScaleSettings",
    "Moments",
    "Precision",
    "Rule",
    "dtype_name",
    "get_precision",
    "matches",
    "parse_dtype",
    "parse_policy",
    "parse_rule",
    "policy_text",
    "preset_names",
    "register_preset",
    "wider",
]
