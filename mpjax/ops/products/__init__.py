"""Products of matrices and convolutions, as they are and quantised by recipes."""

from mpjax.ops.products.quantized_operand import opened, quantize_operand

__all__ = ["opened", "quantize_operand"]
