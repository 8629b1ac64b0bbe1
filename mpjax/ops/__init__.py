"""The numerically delicate operations, each under its policy."""

from mpjax.ops.attention import KERNELS, attention
from mpjax.ops.conv import conv_general_dilated, convolution
from mpjax.ops.cross_entropy import chunk_length, cross_entropy
from mpjax.ops.dot_general import dot_general
from mpjax.ops.hadamard import hadamard
from mpjax.ops.linear import linear, look_up, scale_by, shift_by
from mpjax.ops.norm import group_norm, norm
from mpjax.ops.objective import Combine, LossFn, Objective, Terms, rows_alike, weight_sum
from mpjax.ops.quantized_operand import how_it_runs
from mpjax.ops.rotary import rotary

__all__ = [
    "Combine",
    "KERNELS",
    "attention",
    "chunk_length",
    "conv_general_dilated",
    "convolution",
    "LossFn",
    "Objective",
    "Terms",
    "cross_entropy",
    "dot_general",
    "group_norm",
    "hadamard",
    "how_it_runs",
    "linear",
    "look_up",
    "norm",
    "rotary",
    "scale_by",
    "shift_by",
    "rows_alike",
    "weight_sum",
]
