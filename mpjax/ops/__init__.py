"""The numerically delicate operations, each under its policy."""

from mpjax.ops.attention import KERNELS, Split, attention, can_split, kernel_for, whole
from mpjax.ops.cross_entropy import chunk_length, cross_entropy
from mpjax.ops.linear import linear, look_up, scale_by, shift_by
from mpjax.ops.norm import group_norm, norm
from mpjax.ops.objective import Combine, LossFn, Objective, Terms, rows_alike, weight_sum
from mpjax.ops.products.conv import conv_general_dilated, convolution
from mpjax.ops.products.dot_general import Sums, dot_general
from mpjax.ops.products.hadamard import hadamard
from mpjax.ops.products.quantized_operand import how_it_runs
from mpjax.ops.rotary import rotary
from mpjax.ops.saved import Saved, from_saved, known_scales, save_for_backward
from mpjax.ops.target import tracing_for

__all__ = [
    "Combine",
    "KERNELS",
    "Split",
    "Saved",
    "Sums",
    "attention",
    "can_split",
    "chunk_length",
    "conv_general_dilated",
    "convolution",
    "LossFn",
    "Objective",
    "Terms",
    "cross_entropy",
    "dot_general",
    "from_saved",
    "known_scales",
    "group_norm",
    "hadamard",
    "kernel_for",
    "how_it_runs",
    "linear",
    "look_up",
    "norm",
    "rotary",
    "save_for_backward",
    "scale_by",
    "shift_by",
    "rows_alike",
    "tracing_for",
    "weight_sum",
    "whole",
]
