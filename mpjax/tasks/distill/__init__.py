"""A student that learns what a teacher answers."""

from mpjax.tasks.distill.answers import Answers
from mpjax.tasks.distill.distillation import Distillation
from mpjax.tasks.distill.divergence import divergence
from mpjax.tasks.distill.intermediates import even_layers

__all__ = ["Answers", "Distillation", "divergence", "even_layers"]
