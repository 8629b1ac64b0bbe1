"""What `bucket_batches(augment=...)` takes: an example of the training side, drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mpjax.data.augment.transform import Transform, check_transforms, transformed
from mpjax.data.augment.word_edits import OUTSIDE, words_of
from mpjax.data.buckets import Augment, Example
from mpjax.data.labelled import LabelledTexts
from mpjax.data.tagged import TaggedSentences
from mpjax.data.tokenizers.wordpiece import WordPiece
from mpjax.errors import ConfigError, brief

Transforms = Sequence[Transform] | Transform


def augmented_texts(
    texts: LabelledTexts,
    examples: Sequence[Example],
    transforms: Transforms,
    pieces: WordPiece,
    *,
    longest: int,
) -> Augment:
    """Returns a function that changes the words of a text and encodes it; its label stays.

    Of a pair, both texts are changed.

    Args:
        texts: the training side.
        examples: the same texts encoded, whose labels and other fields stay.
        transforms: of texts, one after the other.
        pieces: tokenizer.
        longest: tokens at most; what is longer is cut.

    Returns:
        Place of a text, random generator -> its example, for `bucket_batches(augment=...)`.

    Raises:
        ConfigError: no transforms, other numbers of texts and examples, a text without words.

    Example:
        >>> from mpjax.data import bucket_batches, train_wordpiece
        >>> from mpjax.data.augment import RandomDeletion
        >>> texts = LabelledTexts(("good food",), np.array([1], np.int32), ("bad", "good"))
        >>> pieces = train_wordpiece(texts.texts, 60)
        >>> examples = [e | {"labels": np.int32(1)} for e in pieces.encode(texts.texts, longest=8)]
        >>> augment = augmented_texts(texts, examples, RandomDeletion(0.5), pieces, longest=8)
        >>> data = bucket_batches(examples, batch=1, seed=0, lengths=(4,), augment=augment)
        >>> [pieces.tokens(next(data)["ids"][0]) for _ in range(2)]
        [['[CLS]', 'good', 'food', '[SEP]'], ['[CLS]', 'food', '[SEP]', '[PAD]']]
    """
    found = check_transforms("augmented_texts", transforms)
    if len(texts) != len(examples):
        raise ConfigError(
            f"augmented_texts: {len(texts)} texts and {len(examples)} examples; give one for each"
        )
    for side in (texts.texts, texts.seconds):
        _check_words(side)

    def augment(place: int, draw: np.random.Generator) -> Example:
        first = transformed(found, texts.texts[place], draw)
        seconds = [transformed(found, texts.seconds[place], draw)] if texts.seconds else []
        encoded = pieces.encode([first], seconds, longest=longest, quiet=True)
        return {**examples[place], **encoded[0]}

    return augment


def _check_words(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts):
        if not text.split():
            raise ConfigError(f"augmented_texts: text {number} has no words; leave it out")


def augmented_sentences(
    sentences: TaggedSentences,
    transforms: Transforms,
    encode: Callable[[TaggedSentences], Sequence[Example]],
) -> Augment:
    """Returns a function that changes the words of a tagged sentence, whose tags follow.

    Args:
        sentences: the training side; tags with B- or I- are BIO.
        transforms: of (word, tag) pairs, one after the other.
        encode: sentences -> their examples, as `TokenClassification.examples` with its tokenizer
            and length; it refuses what insertions make too long, so leave room for them.

    Returns:
        Place of a sentence, random generator -> its example, for `bucket_batches(augment=...)`.

    Raises:
        ConfigError: no transforms, tags of entities that are not BIO, or insertion where no tag
            is O; when called, a tag that is none of the data's.

    Example:
        >>> import functools
        >>> from mpjax.data import train_wordpiece
        >>> from mpjax.data.augment import RandomDeletion
        >>> from mpjax.tasks import TokenClassification
        >>> names = ("B-city", "I-city", "O")
        >>> tags = np.array([2, 0, 1], np.int32)
        >>> data = TaggedSentences((("to", "New", "York"),), (tags,), names)
        >>> pieces = train_wordpiece(["to new york"], 60)
        >>> encode = functools.partial(TokenClassification(names).examples, pieces, longest=8)
        >>> augment = augmented_sentences(data, RandomDeletion(0.5), encode)
        >>> example = augment(0, np.random.default_rng(3))
        >>> pieces.tokens(example["ids"]), example["labels"].tolist()
        (['[CLS]', 'york', '[SEP]'], [-100, 0, -100])
    """
    found = check_transforms("augmented_sentences", transforms)
    names = sentences.names
    entities = [name for name in names if name.startswith(("B-", "I-"))]
    if entities and (other := [n for n in names if n not in entities and n != OUTSIDE]):
        raise ConfigError(
            f"augmented_sentences: the tags {entities[0]!r} and {other[0]!r} are not of one kind;"
            " give BIO tags: B-X, I-X and O"
        )
    inner = [each for one in found for each in (one, *getattr(one, "transforms", ()))]
    if OUTSIDE not in names and any(getattr(one, "inserts", False) for one in inner):
        raise ConfigError(
            "augmented_sentences: an inserted word gets the tag O, which these tags lack; leave"
            " RandomInsertion and eda out"
        )
    number = {name: i for i, name in enumerate(names)}

    def augment(place: int, draw: np.random.Generator) -> Example:
        tags = [names[tag] for tag in sentences.tags[place]]
        pairs = words_of(
            transformed(found, tuple(zip(sentences.words[place], tags, strict=True)), draw)
        )
        if strange := [tag for _, tag in pairs if tag not in number]:
            raise ConfigError(
                f"augmented_sentences: the tag {strange[0]!r} is none of the data's; expected"
                f" {' '.join(names)}"
            )
        new = np.array([number[tag] for _, tag in pairs], np.int32)
        return encode(TaggedSentences((tuple(word for word, _ in pairs),), (new,), names))[0]

    return augment


def augmented_examples(examples: Sequence[Example], transforms: Transforms) -> Augment:
    """Returns a function that changes encoded texts, as `TokenDropout` does.

    Args:
        examples: of the training side.
        transforms: of examples, one after the other.

    Returns:
        Place of an example, random generator -> the example, for `bucket_batches(augment=...)`.

    Raises:
        ConfigError: no transforms.

    Example:
        >>> from mpjax.data import train_wordpiece
        >>> from mpjax.data.augment import TokenMasking
        >>> pieces = train_wordpiece(["good food"], 60)
        >>> examples = pieces.encode(["good food"], longest=8)
        >>> augment = augmented_examples(examples, TokenMasking(0.5, pieces))
        >>> pieces.tokens(augment(0, np.random.default_rng(0))["ids"])
        ['[CLS]', 'good', '[MASK]', '[SEP]']
    """
    found = check_transforms("augmented_examples", transforms)
    if not len(examples):
        raise ConfigError(f"augmented_examples: {brief(examples)} is empty; name more data")
    return lambda place, draw: transformed(found, examples[place], draw)
