"""Text sources, tokenizers and input pipelines."""

from mpjax.data.buckets import Batch, bucket_batches, eval_batches
from mpjax.data.corpus import Corpus, load_corpus
from mpjax.data.images import Images, image_batches, load_images
from mpjax.data.interactions import (
    Interactions,
    candidates,
    histories,
    leave_one_out,
    load_interactions,
)
from mpjax.data.labelled import LabelledTexts, load_labelled
from mpjax.data.masking import segment_pairs
from mpjax.data.mixing import mixed_batches, mixing_weights
from mpjax.data.packing.packed_batches import (
    PackedBatches,
    document_examples,
    packed_batches,
)
from mpjax.data.pairs import load_pairs
from mpjax.data.pipeline import ValidationBatches, batches, validation_batches
from mpjax.data.split import split_documents
from mpjax.data.tagged import TaggedSentences, load_tagged, most_frequent_tags
from mpjax.data.text import Document, read_documents
from mpjax.data.tokenizers.characters import Characters
from mpjax.data.tokenizers.tokenizer import Tokenizer, make_tokenizer
from mpjax.data.tokenizers.wordpiece import (
    Example,
    WordPiece,
    load_wordpiece,
    parse_wordpiece,
    train_wordpiece,
)

__all__ = [
    "Batch",
    "Characters",
    "Corpus",
    "Document",
    "Example",
    "Images",
    "Interactions",
    "LabelledTexts",
    "PackedBatches",
    "TaggedSentences",
    "Tokenizer",
    "ValidationBatches",
    "WordPiece",
    "batches",
    "bucket_batches",
    "candidates",
    "document_examples",
    "eval_batches",
    "histories",
    "image_batches",
    "leave_one_out",
    "load_corpus",
    "load_images",
    "load_interactions",
    "load_labelled",
    "load_pairs",
    "load_tagged",
    "load_wordpiece",
    "make_tokenizer",
    "mixed_batches",
    "mixing_weights",
    "most_frequent_tags",
    "packed_batches",
    "parse_wordpiece",
    "read_documents",
    "segment_pairs",
    "split_documents",
    "train_wordpiece",
    "validation_batches",
]
