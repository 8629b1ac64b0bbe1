"""Does augmentation help a classifier that has few texts? Each way against none, seeds paired.

A small encoder learns the sign of film snippets from 500 texts, drawn anew for each seed. In every
arm of a seed it begins with the same weights and has the same texts, order and dropout; the arms
differ in what becomes of a text in each epoch, and held-out texts are never changed.

Run:       python experiments/augment.py
           python experiments/augment.py --augment swap eda --rate 0.2 --synonyms FILE
           python experiments/augment.py --checkpoint minilm --precision fp32 bf16
Expected:  a table of gains in points with their 90 % intervals over the seeds, the same as a plot;
           all intervals hold 0, and held-out losses fall (docs/evidence/augment.md).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from finetune_classifier import baselines

from common import (
    finetune,  # sets XLA flags before JAX starts
    finetune_report,
    launch,
)
from common.datasets.sources import LABELLED
from common.datasets.wordnet import read_wordnet
from common.tables import terminal, write_page
from mpjax.data import Batch, LabelledTexts, WordPiece, bucket_batches, load_labelled
from mpjax.data.augment import (
    OneOf,
    RandomDeletion,
    RandomInsertion,
    RandomSwap,
    SynonymReplacement,
    TokenDropout,
    TokenMasking,
    augmented_examples,
    augmented_texts,
    contextual_replacement,
    eda,
    read_synonyms,
)
from mpjax.data.buckets import Augment, Example
from mpjax.data.masking import masking
from mpjax.errors import ConfigError, need
from mpjax.files import write_text
from mpjax.markdown import table
from mpjax.models import encoder
from mpjax.precision import PrecisionSchedule
from mpjax.report import interval, save_plot
from mpjax.report.canvas import canvas
from mpjax.tasks import MaskedLanguage, Mixup, TextClassification, predictor
from mpjax.train import SwitchingStep, TrainStep, build, fit
from mpjax.typing import Params, Settings

CONFIDENCE = 0.9
NONE = "none"
OF_TEXTS = ("swap", "delete", "insert", "synonym", "eda")
OF_TOKENS = ("dropout", "mask")
MIXUPS = {"mixup": "sentence", "word-mixup": "word"}
KNOWN = (*OF_TEXTS, *OF_TOKENS, "contextual", *MIXUPS)
WITH_SYNONYMS = {"insert", "synonym", "eda"}


@dataclasses.dataclass(frozen=True)
class Config(finetune.Tuning):
    """Train a text classifier on few texts, augmented and not."""

    data: str = "movie-snippets"
    """`movie-snippets`, `reviews`, `bbc`, or a file: label<TAB>text lines, .csv or .jsonl."""
    texts: int = 500
    """Training texts of a seed."""
    augment: tuple[str, ...] = KNOWN
    """Arms, each compared with `none`: swap, delete, insert, synonym, eda (one of these four),
    dropout, mask (of tokens), contextual (tokens of a masked-language model that is trained on the
    same texts), mixup (of encoded texts), word-mixup (of embeddings)."""
    rate: float = 0.1
    """Share of the words or tokens of a text that is changed."""
    share: float = 0.5
    """Share of the texts that are changed, in every epoch others."""
    alpha: float = 0.4
    """Of mixup's Beta distribution."""
    synonyms: str = "wordnet"
    """`wordnet`, or a file of `word: synonym, synonym` lines."""
    checkpoint: str = "none"
    """An asset such as `minilm`, a folder or a name on the Hugging Face Hub; `none` trains anew."""
    precision: tuple[str, ...] = ("fp32",)
    """Precisions; the arms of each are compared with its own `none`."""
    pool: Literal["mean", "first"] = "mean"
    """What the head takes of a text: the mean of its tokens, or the first through BERT's pooler."""
    lengths: tuple[int, ...] = (16, 32, 64)
    """Tokens that texts are padded to; a step is compiled for each. Longer texts are cut."""
    steps: int = 120
    """Steps a run."""
    lr: float = 1e-3
    """Peak learning rate."""
    seeds: int = 5
    """Seeds an arm; each has texts, weights, order and dropout of its own, the same in all arms."""
    out: Path = Path("runs/augment")
    """Folder of the report and of all runs."""


def check(config: Config) -> None:
    """Checks the settings that other experiments do not have."""
    finetune.check(config)
    launch.positive(config, "texts", "share", "alpha")
    launch.not_empty(config, "augment")
    launch.distinct(config, "augment")
    if not 0 <= config.rate < 1:
        raise ConfigError(f"rate: {config.rate}; give a share of 0 or above and below 1, as 0.1")
    if config.share > 1:
        raise ConfigError(f"share: {config.share} is above 1; give a share of the texts, as 0.5")
    for name in config.augment:
        if name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"augment: unknown {name!r}; {hint}known: {' '.join(KNOWN)}")


def word_list(config: Config) -> dict[str, Any]:
    """Returns the synonyms, if an arm needs them; function words have none in WordNet."""
    if not WITH_SYNONYMS & set(config.augment):
        return {}
    if config.synonyms != "wordnet":
        return dict(read_synonyms(config.synonyms))
    text = need("sklearn.feature_extraction.text", "tasks", "function words")
    return read_wordnet(without=text.ENGLISH_STOP_WORDS)


@dataclasses.dataclass(frozen=True)
class Side:
    """The training side of one seed: its texts, also encoded."""

    texts: LabelledTexts
    examples: list[Example]


def training_side(config: Config, train: LabelledTexts, encode: Any, seed: int) -> Side:
    """Returns the texts of a seed."""
    order = np.random.default_rng((seed, 5)).permutation(len(train))
    texts = train.take(order[: config.texts])
    if len(set(texts.labels.tolist())) < 2:
        raise ConfigError(f"texts: {config.texts} are all of one class in seed {seed}; give more")
    return Side(texts, encode(texts))


def rewritten(config: Config, pieces: WordPiece) -> Callable[[Side, int], list[Example]]:
    """Returns a function that trains a masked-language model on a side's texts and rewrites them.

    The model is of the classifier's size without a checkpoint, and trained for as many steps.
    """
    model = encoder(
        "bert-tiny", config.precision[0], vocabulary=pieces.vocab_size, layers=config.layers,
        width=config.width, heads=config.heads, context=max(config.lengths), head="masked",
    )  # fmt: skip
    task = MaskedLanguage(next=0.0)
    _, step = build(model, finetune.raw_optimizer(config), clip=1.0, objective=task.objective)
    predict = predictor(model, "masked", batch=config.batch, lengths=config.lengths)

    def rewrite(side: Side, seed: int) -> list[Example]:
        assert step.init is not None
        plain = [{name: e[name] for name in ("ids", "types", "keep")} for e in side.examples]
        data = bucket_batches(
            plain, batch=config.batch, seed=seed, lengths=config.lengths, change=masking(pieces)
        )
        state = fit(step.init(seed), step, data, steps=config.steps, report=lambda record: None)
        logits = functools.partial(predict, state.params)
        return contextual_replacement(
            side.examples, logits, pieces, rate=config.rate, seed=seed, batch=config.batch
        )

    return rewrite


def transforms(config: Config, pieces: WordPiece, synonyms: dict[str, Any]) -> dict[str, Any]:
    """Returns what changes a text or its tokens, by arm."""
    of: dict[str, Callable[[], Callable[..., Any]]] = {
        "swap": lambda: RandomSwap(config.rate),
        "delete": lambda: RandomDeletion(config.rate),
        "insert": lambda: RandomInsertion(config.rate, synonyms),
        "synonym": lambda: SynonymReplacement(config.rate, synonyms),
        "eda": lambda: eda(synonyms, config.rate),
        "dropout": lambda: TokenDropout(config.rate, pieces),
        "mask": lambda: TokenMasking(config.rate, pieces),
    }
    return {name: OneOf([of[name]()], config.share) for name in config.augment if name in of}


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    check(config)
    begun = time.perf_counter()
    train, test = load_labelled(config.data, sources=LABELLED)
    need("sklearn.metrics", "tasks", "metrics")
    if config.texts > len(train):
        raise ConfigError(f"texts: {config.texts}, the training side has {len(train)}; lower it")
    task = TextClassification(train.classes)
    start = finetune.Start(
        config, "class", len(train.classes), train.texts, config.pool, train.classes
    )
    pieces, longest = start.pieces(), max(config.lengths)
    encode = functools.partial(task.examples, pieces, longest=longest)
    changes = transforms(config, pieces, word_list(config))
    held_out = encode(test)
    sides = [training_side(config, train, encode, seed) for seed in range(config.seeds)]
    model = finetune.check_arms(config, task, start, pieces.vocab_size)
    launch.writable(config.out)
    predict = task.predictor(model, batch=config.batch, lengths=config.lengths)

    def judge(params: Params) -> tuple[dict[str, float], np.ndarray]:
        logits = predict(params, held_out)
        return task.evaluate(logits, held_out), task.correct(logits, held_out)

    rewrite = rewritten(config, pieces) if "contextual" in config.augment else None
    copies = functools.cache(lambda seed: rewrite(sides[seed], seed))  # type: ignore[misc]

    def augment(name: str, seed: int) -> Augment | None:
        side = sides[seed]
        if name in OF_TEXTS:
            return augmented_texts(
                side.texts, side.examples, changes[name], pieces, longest=longest
            )
        if name in OF_TOKENS:
            return augmented_examples(side.examples, changes[name])
        if name == "contextual":
            new = copies(seed)
            return lambda place, draw: (
                new[place] if draw.random() < config.share else side.examples[place]
            )
        return None

    def arm(precision: str, name: str) -> finetune_report.Arm:
        label = name if len(config.precision) == 1 else f"{precision}, {name}"
        reference = label.replace(name, NONE)
        schedule = finetune.read_schedule(precision, config.steps)
        own, step = steps(precision, schedule, MIXUPS.get(name, ""))

        def data(seed: int) -> Iterator[Batch]:
            return bucket_batches(
                sides[seed].examples, batch=config.batch, seed=seed, lengths=config.lengths,
                augment=augment(name, seed),
            )  # fmt: skip

        def page(seed: int) -> tuple[Path, Settings]:
            return finetune.page_of(label, config, schedule, own, seed, config.out)

        return finetune.run_seeds(label, reference, config, step, own, start, data, judge, page)

    @functools.cache
    def steps(
        precision: str, schedule: PrecisionSchedule, mixed: str
    ) -> tuple[finetune.Network, TrainStep | SwitchingStep]:
        own = start.model(schedule.first, pieces.vocab_size)
        mixup = Mixup(task, config.alpha, mixed) if mixed else task
        _, step = build(
            own, finetune.raw_optimizer(config), clip=config.clip,
            objective=mixup.objective, schedule=schedule,
        )  # fmt: skip
        return own, step

    arms = {
        precision: [arm(precision, name) for name in (NONE, *config.augment)]
        for precision in config.precision
    }
    counted = [baselines(side.texts, test) for side in sides]
    notes = [
        f"{config.texts} training and {len(test)} held-out texts, {config.seeds} seeds,"
        f" {config.steps} steps of {config.batch}; a rate of {config.rate:g} in a share of"
        f" {config.share:g} of the texts.",
        f"Of the {CONFIDENCE:.0%} intervals of {len(config.augment)} arms without any gain,"
        f" {(1 - CONFIDENCE) * len(config.augment):.1f} leave 0 out by chance.",
        f"Took {time.perf_counter() - begun:.0f} s on {launch.machine()}.",
    ]
    report(config, arms, counted, notes)


def gain(arm: finetune_report.Arm, reference: finetune_report.Arm) -> tuple[float, float]:
    """Points of accuracy above the reference, and the half-width of their interval."""
    return interval(finetune_report.gap_points(arm, reference), CONFIDENCE)


def report(
    config: Config, arms: dict[str, list[finetune_report.Arm]],
    counted: Sequence[dict[str, dict[str, float]]], notes: Sequence[str],
) -> None:  # fmt: skip
    """Prints the table, and writes report.md, report.html, results.* and gain.png."""
    head = ("arm", "accuracy, %", f"gain, points ({CONFIDENCE:.0%})", "", "held-out loss")
    rows = [
        (name, f"{100 * np.mean([one[name]['accuracy'] for one in counted]):.2f}", "–", "", "–")
        for name in counted[0]
    ]
    gains: dict[str, tuple[float, float]] = {}
    for none, *others in arms.values():
        for arm in (none, *others):
            cells = ("–", "")
            if arm is not none:
                mean, half = gains[arm.label] = gain(arm, none)
                cells = (f"{mean:+.2f} ± {half:.2f}", "null" if abs(mean) <= half else "not 0")
                cells = (f"{mean:+.2f}", "one seed") if np.isnan(half) else cells
            accuracy = f"{100 * np.mean(arm.score('accuracy')):.2f}"
            rows.append((arm.label, accuracy, *cells, f"{np.mean(arm.score('loss')):.4f}"))
    title = f"{config.data}: augmentation of {config.texts} texts"
    console = launch.wide()
    console.print(terminal(title, head, rows))
    console.print("\n".join(notes), highlight=False, markup=False)
    save_plot(plot(gains), config.out / "gain.png")
    parts = [f"# {title}", table(head, rows), "\n".join(f"- {note}" for note in notes)]
    write_text(config.out / "report.md", "\n\n".join([*parts, "![gain](gain.png)"]) + "\n")
    outcomes = [arm.outcome for group in arms.values() for arm in group]
    write_page(config.out, outcomes, [(title, head, rows)], notes, "nats/text")
    results = {
        "baselines": list(counted),
        "arms": {arm.label: arm.scores for group in arms.values() for arm in group},
    }
    write_text(config.out / "results.json", json.dumps(results, indent=1) + "\n")
    console.print(f"report: {config.out / 'report.md'}", highlight=False)


def plot(gains: dict[str, tuple[float, float]]) -> Any:
    """Returns the gains with their intervals."""
    figure = canvas(7, 1 + 0.35 * len(gains))
    axes = figure.subplots()
    means, halves = np.array(list(gains.values())).T
    axes.errorbar(means, range(len(gains)), xerr=np.nan_to_num(halves), fmt="o", capsize=3)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(gains)), list(gains))
    axes.invert_yaxis()
    axes.set_xlabel(f"points of accuracy above none, {CONFIDENCE:.0%} intervals")
    return figure


if __name__ == "__main__":
    launch.command(main, Config)
