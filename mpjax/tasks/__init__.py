"""Objectives: how a batch becomes a loss, and predictions become metrics."""

from mpjax.tasks.classify import TextClassification
from mpjax.tasks.distillation import Distillation
from mpjax.tasks.divergence import divergence
from mpjax.tasks.labels import label_loss
from mpjax.tasks.language import Language
from mpjax.tasks.metrics import calibration_error, class_scores, entity_scores, text_scores
from mpjax.tasks.mixture.mixture import Mixture
from mpjax.tasks.mixture.task_gradients import GradNorm, gradient_shares, pcgrad
from mpjax.tasks.predict import predictor, softmax
from mpjax.tasks.pretrain import MaskedLanguage
from mpjax.tasks.regress import TextRegression
from mpjax.tasks.tag import TokenClassification
from mpjax.tasks.translate import Translation

__all__ = [
    "Distillation",
    "GradNorm",
    "Language",
    "MaskedLanguage",
    "Mixture",
    "TextClassification",
    "TextRegression",
    "TokenClassification",
    "Translation",
    "calibration_error",
    "class_scores",
    "divergence",
    "entity_scores",
    "gradient_shares",
    "label_loss",
    "pcgrad",
    "predictor",
    "softmax",
    "text_scores",
]
