"""What a number is: number formats, rounding to them, quantised arrays and what they lose."""

from mpjax.formats.delayed import AmaxHistory, begin_step, end_step, observed_of
from mpjax.formats.format_table import Format, widest
from mpjax.formats.measures import max_error, saturation_rate, sqnr, underflow_rate
from mpjax.formats.quantize import fake_quantize, quantize
from mpjax.formats.quantized import Quantized, is_quantized, slice_view, weight_view
from mpjax.formats.rounding import ROUNDINGS, check_rounding, round_to
from mpjax.formats.scaling import Scaling, check_offset, check_scaling

__all__ = [
    "ROUNDINGS",
    "AmaxHistory",
    "Format",
    "Quantized",
    "Scaling",
    "begin_step",
    "check_offset",
    "check_rounding",
    "check_scaling",
    "end_step",
    "fake_quantize",
    "is_quantized",
    "max_error",
    "observed_of",
    "quantize",
    "round_to",
    "saturation_rate",
    "slice_view",
    "sqnr",
    "underflow_rate",
    "weight_view",
    "widest",
]
