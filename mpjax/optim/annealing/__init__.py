"""Simulated annealing combined with gradient descent."""

from mpjax.optim.annealing.annealing import (
    Annealing,
    AnnealState,
    alternate,
    anneal_then_descend,
    annealed,
)
from mpjax.optim.annealing.cooling import affine, cosine, logarithmic
from mpjax.optim.annealing.proposals import Proposal, gaussian, langevin, random_rate, updates_of

__all__ = [
    "AnnealState",
    "Annealing",
    "Proposal",
    "affine",
    "alternate",
    "anneal_then_descend",
    "annealed",
    "cosine",
    "gaussian",
    "langevin",
    "logarithmic",
    "random_rate",
    "updates_of",
]
