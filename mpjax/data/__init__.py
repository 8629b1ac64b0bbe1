"""Text sources, tokenizers and input pipelines."""

from mpjax.data.corpus import Corpus, load_corpus
from mpjax.data.pipeline import ValidationBatches, batches, validation_batches
from mpjax.data.split import split_documents
from mpjax.data.text import Document, read_documents
from mpjax.data.tokenizers.tokenizer import Tokenizer, make_tokenizer

__all__ = [
    "Corpus",
    "Document",
    "Tokenizer",
    "ValidationBatches",
    "batches",
    "load_corpus",
    "make_tokenizer",
    "read_documents",
    "split_documents",
    "validation_batches",
]
