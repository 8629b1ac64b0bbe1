"""Optimizers in mixed precision: loss scale, finite gate, low-precision weights and moments."""

from mpjax.formats import weight_view
from mpjax.optim.buffers import copied, without_repeats
from mpjax.optim.by_name import OPTIMIZERS, SCHEDULES, make_optimizer, make_schedule
from mpjax.optim.compression import Exchange, ExchangeState, one_bit_adam
from mpjax.optim.flax_state import register_when_imported
from mpjax.optim.fp8_weights import store_weights
from mpjax.optim.gate import GateState, all_finite, finite_by_leaf, leaf_path, select
from mpjax.optim.gradient_norm import global_norm
from mpjax.optim.loss_scale.from_settings import make_loss_scale
from mpjax.optim.loss_scale.leaf_scale import LeafLossScale, scale_gradient
from mpjax.optim.loss_scale.logmax import LogMaxLossScale
from mpjax.optim.loss_scale.multi_loss import MultiLossScale, scaled_value_and_grads
from mpjax.optim.loss_scale.scaled import ScaledGradients
from mpjax.optim.loss_scale.scalers import (
    DynamicLossScale,
    LossScale,
    NoOpLossScale,
    StaticLossScale,
)
from mpjax.optim.moments.blockwise import Blockwise, quantize_blocks
from mpjax.optim.moments.low_moments import quantize_moments
from mpjax.optim.per_layer.layer_view import each_layer
from mpjax.optim.pruning.magnitude import (
    cubic_sparsity,
    prune_weights,
    pruned,
    sparsity_by_path,
)
from mpjax.optim.update_rules import apply_updates, float32_view
from mpjax.optim.value_and_grad import scaled_grad, scaled_value_and_grad
from mpjax.optim.wrap import Optimizer, OptState, wrap

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "make_optimizer",
    "make_schedule",
    "Blockwise",
    "DynamicLossScale",
    "Exchange",
    "ExchangeState",
    "GateState",
    "LeafLossScale",
    "LogMaxLossScale",
    "LossScale",
    "MultiLossScale",
    "NoOpLossScale",
    "OptState",
    "Optimizer",
    "ScaledGradients",
    "StaticLossScale",
    "all_finite",
    "apply_updates",
    "copied",
    "cubic_sparsity",
    "each_layer",
    "finite_by_leaf",
    "float32_view",
    "global_norm",
    "leaf_path",
    "make_loss_scale",
    "one_bit_adam",
    "prune_weights",
    "pruned",
    "quantize_blocks",
    "quantize_moments",
    "scale_gradient",
    "scaled_grad",
    "scaled_value_and_grad",
    "scaled_value_and_grads",
    "select",
    "sparsity_by_path",
    "store_weights",
    "weight_view",
    "without_repeats",
    "wrap",
]

register_when_imported()
