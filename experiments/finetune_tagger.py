"""Does a low precision cost a tagger accuracy? Parts of speech, entities, or Chinese words.

A pre-trained encoder with a new head tags words, in several precisions, against the tag that each
word had most often in training. Chinese has no spaces between words: there the encoder tags
characters, and a tag says whether a word begins there and what part of speech it is.

Run:       python experiments/finetune_tagger.py
           python experiments/finetune_tagger.py --task ner --steps 300
           python experiments/finetune_tagger.py --data FILE --checkpoint none
           python experiments/finetune_tagger.py --task chinese --checkpoint none --vocabulary 6000
Expected:  parts of speech: fp32 6.1 points above the baseline (4.3 with --no-capitals, one seed),
           bf16 within 0.1 points of it; named entities: F1 of 51 % against the baseline's 30 %,
           bf16 within the noise of three seeds, which is wide (docs/evidence/finetune.md); Chinese
           without a checkpoint: 6.7 points in 400 steps of 32 (docs/evidence/recommend.md). A run
           of one seed takes 5 to 7 minutes on two cores, of the entities 2.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from common import (
    finetune,  # sets XLA flags before JAX starts
    finetune_report,
    launch,
)
from common.datasets.sources import TAGGED
from mpjax.data import TaggedSentences, load_tagged, most_frequent_tags
from mpjax.errors import ConfigError, need
from mpjax.report import length_slices
from mpjax.tasks import TokenClassification, entity_scores, softmax
from mpjax.typing import Params


@dataclasses.dataclass(frozen=True)
class Config(finetune.Tuning):
    """Fine-tune a tagger in several precisions."""

    task: Literal["pos", "ner", "chinese"] = "pos"
    """Parts of speech; named entities in BIO tags, which are scored whole too; or characters with
    the part of speech of their word in such tags, for which whole words are scored."""
    data: str = ""
    """A file of word<TAB>tag lines; by default the task's own data, fetched at first use."""
    precision: tuple[str, ...] = ("fp32", "bf16")
    """Precisions, or schedules such as late:fp8:bf16:0.2; others are compared with the first."""
    capitals: bool = True
    """Tell the model by token types which words begin with a capital: MiniLM reads lower case."""
    lengths: tuple[int, ...] = (16, 32, 48, 64, 128, 512)
    """Tokens that sentences are padded to; a step is compiled for each. Nothing is cut."""
    batch: int = 16
    """Sentences a step."""
    steps: int = 973
    """Steps a run; one epoch of the parts of speech."""
    lr: float = 5e-4
    """Peak learning rate."""
    WARMUP: ClassVar[int] = 60
    warmup: launch.Warmup = None
    """Steps of linear warm-up; by default 60, or half of the steps if these are fewer."""
    out: Path = Path("runs/finetune_tagger")
    """Folder of the report and of all runs."""


SOURCES = {"pos": "pos-oanc", "ner": "ner-tweets", "chinese": "peoples-daily"}


def word_f1(task: TokenClassification, tags: Sequence[np.ndarray], test: TaggedSentences) -> float:
    """F1 of words that are cut out right, whatever their part of speech."""
    sides = [[[task.names[t][:1] + "-word" for t in s] for s in side] for side in (test.tags, tags)]
    return entity_scores(sides[0], sides[1])["f1"]


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    finetune.check(config)
    begun = time.perf_counter()
    source, entities = config.data or SOURCES[config.task], config.task != "pos"
    chinese = config.task == "chinese"
    train, test = load_tagged(source, sources=TAGGED)
    if chinese and (odd := [name for name in train.names if name[:2] not in ("B-", "I-")]):
        raise ConfigError(
            f"data {source!r}: tag {odd[0]!r} of a character; expected B-TAG where a word begins"
            " and I-TAG inside it, or set --task pos"
        )
    need("sklearn.metrics", "tasks", "metrics")
    if entities:
        need("seqeval.metrics", "tasks", "metrics")
    task = TokenClassification(train.names, capitals=config.capitals)
    texts = [" ".join(words) for words in train.words]
    start = finetune.Start(config, "token", len(train.names), texts, labels=train.names)
    pieces, longest = start.pieces(), max(config.lengths)
    examples, held_out = (task.examples(pieces, side, longest=longest) for side in (train, test))
    model = finetune.check_arms(config, task, start, pieces.vocab_size)
    types = getattr(model.config, "types", 0)
    if config.capitals and types < 2:
        raise ConfigError(
            f"capitals: the checkpoint has {types} token types, two are needed; add --no-capitals"
        )
    launch.writable(config.out)
    guess = most_frequent_tags(train, test)

    def evaluated(tags: Sequence[np.ndarray]) -> dict[str, float]:
        scores = task.evaluate(tags, test, entities=entities)
        return scores | ({"word f1": word_f1(task, tags, test)} if chinese else {})

    counted = {"most frequent tag": evaluated(guess)}
    predict = task.predictor(model, batch=config.batch, lengths=config.lengths)
    right = np.concatenate(test.tags)

    def judge(params: Params) -> tuple[dict[str, float], np.ndarray]:
        logits = predict(params, held_out)
        tags = task.tags(logits, held_out)
        words = np.concatenate(
            [one[e["labels"] >= 0] for one, e in zip(logits, held_out, strict=True)]
        )
        loss = float(-np.log(softmax(words)[np.arange(len(right)), right]).mean())
        return evaluated(tags) | {"loss": loss}, np.concatenate(tags) == right

    arms = [
        finetune.run_arm(label, config, task, start, examples, pieces.vocab_size, judge, config.out)
        for label in config.precision
    ]
    known = {word for words in train.words for word in words}
    sizes = length_slices([len(words) for words in test.words], unit="words")
    slices = {
        "word": [
            "seen in training" if w in known else "new" for words in test.words for w in words
        ],
        "length of sentence": [
            size for size, words in zip(sizes, test.words, strict=True) for _ in words
        ],
    }
    extra = ("macro f1", *(("entity f1",) if entities else ()), *(("word f1",) if chinese else ()))
    found = finetune_report.tables(f"{source} by precision", counted, arms, extra, slices)
    name = "entity f1" if config.task == "ner" else "accuracy"
    best = counted["most frequent tag"][name]
    lead = finetune_report.above([100 * (a - best) for a in arms[0].score(name)])
    notes = [
        f"{arms[0].label} is {lead} points of {name} above the most frequent tag"
        f" (95 % interval over {config.seeds} seeds).",
        f"{len(train)} training sentences, {test.word_count} words in {len(test)} held-out ones,"
        f" {config.steps} steps of {config.batch}, judged in {config.eval_precision}.",
        *(["Entity F1 is of words with their part of speech."] if chinese else []),
        f"A slice with * has its whole 95 % interval over words below zero. Took"
        f" {time.perf_counter() - begun:.0f} s on {launch.machine()}.",
    ]
    finetune_report.write(config.out, found, counted, arms, notes, "nats/word")


if __name__ == "__main__":
    launch.command(main, Config)
