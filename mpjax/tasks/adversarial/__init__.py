"""Adversarial training on token embeddings, and what accuracy is left under attack."""

from mpjax.tasks.adversarial.adversarial import Adversarial, symmetric_divergence
from mpjax.tasks.adversarial.methods import (
    FGM,
    METHODS,
    PGD,
    SMART,
    VAT,
    FreeLB,
    Method,
    RDrop,
)

__all__ = [
    "FGM",
    "METHODS",
    "PGD",
    "SMART",
    "VAT",
    "Adversarial",
    "FreeLB",
    "Method",
    "RDrop",
    "symmetric_divergence",
]
