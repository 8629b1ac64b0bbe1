"""Compressed gradients: their mean over replicas by narrow messages."""

from mpjax.optim.compression.exchange import (
    Exchange,
    ExchangeState,
    compressed_paths,
    first_basis,
)
from mpjax.optim.compression.one_bit_adam import one_bit_adam, scale_by_frozen_adam

__all__ = [
    "Exchange",
    "ExchangeState",
    "compressed_paths",
    "first_basis",
    "one_bit_adam",
    "scale_by_frozen_adam",
]
