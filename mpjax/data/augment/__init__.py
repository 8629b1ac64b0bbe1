"""Augmentation: records of the training side, changed anew in every epoch."""

from mpjax.data.augment.image_transforms import (
    ColourJitter,
    RandomCrop,
    RandomFlip,
    RandomRotation,
)
from mpjax.data.augment.of_examples import (
    augmented_examples,
    augmented_sentences,
    augmented_texts,
)
from mpjax.data.augment.rewrite import back_translation, contextual_replacement
from mpjax.data.augment.synonyms import read_synonyms
from mpjax.data.augment.token_noise import TokenDropout, TokenMasking
from mpjax.data.augment.transform import OneOf
from mpjax.data.augment.word_edits import (
    RandomDeletion,
    RandomInsertion,
    RandomSwap,
    SynonymReplacement,
    eda,
)

__all__ = [
    "ColourJitter",
    "OneOf",
    "RandomCrop",
    "RandomDeletion",
    "RandomFlip",
    "RandomInsertion",
    "RandomRotation",
    "RandomSwap",
    "SynonymReplacement",
    "TokenDropout",
    "TokenMasking",
    "augmented_examples",
    "augmented_sentences",
    "augmented_texts",
    "back_translation",
    "contextual_replacement",
    "eda",
    "read_synonyms",
]
