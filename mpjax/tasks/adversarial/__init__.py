"""Adversarial training on token embeddings, and what accuracy is left under attack."""

from mpjax.tasks.adversarial.adversarial import Adversarial, symmetric_divergence
from mpjax.tasks.adversarial.methods import (
    FGM,
    PGD,
    SMART,
    VAT,
    FreeLB,
    Method,
    RDrop,
)
from mpjax.tasks.adversarial.robustness import attacker, evaluate_robust

__all__ = [
    "FGM",
    "PGD",
    "SMART",
    "VAT",
    "Adversarial",
    "FreeLB",
    "Method",
    "RDrop",
    "attacker",
    "evaluate_robust",
    "symmetric_divergence",
]
