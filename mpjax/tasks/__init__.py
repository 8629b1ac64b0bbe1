"""Objectives: how a batch becomes a loss, and predictions become metrics."""

from mpjax.tasks.adversarial.adversarial import Adversarial
from mpjax.tasks.classify import TextClassification
from mpjax.tasks.distill.answers import Answers
from mpjax.tasks.distill.distillation import Distillation
from mpjax.tasks.distill.divergence import divergence
from mpjax.tasks.distill.intermediates import even_layers
from mpjax.tasks.labels import label_loss
from mpjax.tasks.language import Language
from mpjax.tasks.metrics import (
    calibration_error,
    class_scores,
    entity_scores,
    ranking_gains,
    ranking_scores,
    target_ranks,
    text_scores,
)
from mpjax.tasks.mixture.mixture import Mixture
from mpjax.tasks.mixture.task_gradients import GradNorm, gradient_shares, pcgrad
from mpjax.tasks.mixup import Mixup
from mpjax.tasks.predictor import predictor, softmax
from mpjax.tasks.pretrain import MaskedLanguage
from mpjax.tasks.rank import Ranking
from mpjax.tasks.regress import TextRegression
from mpjax.tasks.tag import TokenClassification
from mpjax.tasks.translate import Translation

__all__ = [
    "Adversarial",
    "Answers",
    "Distillation",
    "GradNorm",
    "Language",
    "MaskedLanguage",
    "Mixture",
    "Mixup",
    "Ranking",
    "TextClassification",
    "TextRegression",
    "TokenClassification",
    "Translation",
    "calibration_error",
    "class_scores",
    "divergence",
    "entity_scores",
    "even_layers",
    "gradient_shares",
    "label_loss",
    "pcgrad",
    "predictor",
    "ranking_gains",
    "ranking_scores",
    "softmax",
    "target_ranks",
    "text_scores",
]
