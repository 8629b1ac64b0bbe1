"""Does a low precision cost an encoder-decoder quality? Names from Arabic to Latin script.

A Transformer learns to write names in another script, character by character, in several
precisions, against a lexicon with spelling rules that are counted on the same pairs, and against
the nearest pair. Other pairs of texts do as well.

Run:       python experiments/translate.py
           python experiments/translate.py --precision fp32 bf16 fp8 --beams 4 --cache int8
           python experiments/translate.py --data libreoffice-help --tokenizer bpe:4000 \
               --lengths 32 64 --steps 3000
           python experiments/translate.py --data FILE.tsv
Expected:  a comparison of precisions, not a good speller: bf16 inside the noise of fp32. After
           1500 steps (1.6 epochs, 3 seeds, docs/evidence/finetune.md) fp32 has 19.8 % character
           errors and 14.5 % exact, the lexicon 17.6 % and 21.5 %; the default 600 steps give
           24.5 % and 8.2 % (one seed). Raise --steps for more.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import ClassVar

from common import (
    finetune,  # sets XLA flags before JAX starts
    finetune_report,
    launch,
)

import jax  # isort: skip
import numpy as np

from common.datasets.sources import PAIRS
from common.lexicon import learn_lexicon, nearest_targets
from mpjax.data import Characters, load_pairs, make_tokenizer
from mpjax.errors import need
from mpjax.models import Seq2Seq, seq2seq
from mpjax.precision import Precision
from mpjax.report import interval, length_slices
from mpjax.tasks import Translation, text_scores
from mpjax.typing import Params, Settings

LEXICON = "lexicon and spelling"


@dataclasses.dataclass(frozen=True)
class Config:
    """Train an encoder-decoder in several precisions."""

    data: str = "names"
    """`names`, `libreoffice-help` (English to German), or a file of source<TAB>target lines."""
    tokenizer: str = "characters"
    """`characters`, `bytes`, `bpe:SIZE` or a tokenizer.json; one for both sides."""
    precision: tuple[str, ...] = ("fp32", "bf16")
    """Precisions, or schedules such as late:fp8:bf16:0.2; others are compared with the first."""
    eval_precision: str = "fp32"
    """Precision that judges and translates for all of them."""
    beams: int = 1
    """Translations kept at a time; 1 takes the likeliest token."""
    cache: str = ""
    """Storage of the keys and values of a translation, such as `int8`; by default as computed."""
    layers: int = 2
    """Blocks of each half."""
    width: int = 128
    """Width."""
    heads: int = 4
    """Attention heads."""
    dropout: float = 0.0
    """Rate in training."""
    lengths: tuple[int, ...] = (16, 24, 64)
    """Tokens that both sides are padded to; a step is compiled for each. Longer pairs are left
    out."""
    batch: int = 64
    """Pairs a step."""
    steps: int = 600
    """Steps a run."""
    lr: float = 2e-3
    """Peak learning rate."""
    schedule: str = "cosine"
    """`constant`, `linear`, `cosine` or `wsd`."""
    WARMUP: ClassVar[int] = 50
    warmup: launch.Warmup = None
    """Steps of linear warm-up; by default 50, or half of the steps if these are fewer."""
    weight_decay: float = 0.01
    """Decoupled, on matrices."""
    clip: float = 1.0
    """Largest global gradient norm."""
    seeds: int = 3
    """Seeds an arm; the n-th has the same initial weights, batches and dropout in every arm."""
    fresh: bool = False
    """Train again the runs that --out holds; without it those that have ended are taken as they
    are, so that an interrupted comparison goes on."""
    out: Path = Path("runs/translate")
    """Folder of the report and of all runs."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where every run starts: new weights.

    Args:
      config: the settings.
    """

    config: Config

    def model(self, precision: str | Precision, vocabulary: int) -> Seq2Seq:
        """Returns the model in a Precision."""
        c = self.config
        return seq2seq(
            "seq2seq-tiny", precision, vocabulary=vocabulary, layers=c.layers, width=c.width,
            heads=c.heads, dropout=c.dropout, context=max(c.lengths),
            norm_first=True,  # post-norm needs a longer warm-up than these runs have
        )  # fmt: skip

    def params(self, model: finetune.Network, seed: int) -> Params:
        """Returns the parameters that a seed's run begins with."""
        return jax.jit(model.init)(jax.random.key(seed))


def scores(references: list[str], texts: list[str]) -> dict[str, float]:
    """How near translations are, all in 0 ... 1, as the tables take them."""
    found = text_scores(references, texts)
    return found | {name: found[name] / 100 for name in ("bleu", "chrf")}


def check(config: Config) -> None:
    """Checks numbers, before anything is read."""
    launch.positive(
        config, "layers", "width", "heads", "lengths", "batch", "steps", "lr", "clip", "seeds",
        "beams",
    )  # fmt: skip
    launch.not_negative(config, "warmup", "weight_decay", "dropout")
    launch.not_empty(config, "precision", "lengths")
    launch.distinct(config, "precision")


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    check(config)
    begun = time.perf_counter()
    train, test = load_pairs(config.data, sources=PAIRS)
    for module in ("sklearn.neighbors", "sacrebleu"):
        need(module, "tasks", "baselines and metrics")
    texts = [text for pair in train for text in pair]
    spec = config.tokenizer
    task = Translation(Characters(texts) if spec == "characters" else make_tokenizer(spec, texts))
    train, test = (task.fitting(side, longest=max(config.lengths)) for side in (train, test))
    examples, held_out = task.examples(train), task.examples(test)
    start = Start(config)
    model = finetune.check_arms(config, task, start, task.vocabulary)
    # Without gradients there is room for more rows, and a batch takes as long as its longest row.
    shapes: Settings = dict(batch=4 * config.batch, lengths=config.lengths)
    translate = task.translator(model, **shapes, beams=config.beams, cache=config.cache)
    loss = task.judge(model, **shapes)
    sources, references = [s for s, _ in test], [t for _, t in test]
    launch.writable(config.out)
    lexicon = learn_lexicon(train)
    guesses = {
        LEXICON: [lexicon.translate(source) for source in sources],
        "nearest pair": nearest_targets(train, sources),
    }
    counted = {name: scores(references, guess) for name, guess in guesses.items()}
    samples: dict[str, list[str]] = {}

    def judge(params: Params) -> tuple[dict[str, float], np.ndarray]:
        found = translate(params, sources)
        samples["last"] = found
        right = np.array([a == b for a, b in zip(found, references, strict=True)])
        return scores(references, found) | {"loss": loss(params, held_out)["loss"]}, right

    arms, shown = [], []
    for label in config.precision:
        arms.append(finetune.run_arm(
            label, config, task, start, examples, task.vocabulary, judge, config.out,
            again=lambda label, seed: seed == config.seeds - 1,  # its translations are shown
        ))  # fmt: skip
        shown.append((label, samples["last"]))
    known = {word for source, _ in train for word in source.split()}
    slices = {
        "words of the source": [
            "all seen in training" if known.issuperset(s.split()) else "one new or more"
            for s in sources
        ],
        "length of the source": length_slices([len(e["source"]) for e in held_out]),
    }
    found = finetune_report.tables(
        f"{config.data} by precision, scores in percent", counted, arms, ("bleu", "chrf"), slices,
        measured=("cer", "exact"),
    )  # fmt: skip
    few = np.linspace(0, len(test) - 1, min(6, len(test))).astype(int)
    columns = ("source", "reference", LEXICON, *(label for label, _ in shown))
    written = [sources, references, guesses[LEXICON], *(texts for _, texts in shown)]
    rows = [tuple(texts[i] for texts in written) for i in few]
    found.append(("held-out translations of the last seed", columns, rows))
    notes = [verdict(arm, arms[0]) for arm in arms[1:]]
    best = min(counted, key=lambda name: counted[name]["cer"])
    for name in ("cer", "exact"):
        above = [100 * (x - counted[best][name]) for x in arms[0].score(name)]
        notes.append(
            f"{arms[0].label}: {finetune_report.above(above)} points of {name} from the best"
            f" baseline, {best} (95 % interval over {config.seeds} seeds)."
        )
    notes += [
        f"cer: edits a character of the reference. exact: at most"
        f" {100 * len(set(sources)) / len(test):.1f} % can be, for some sources have several"
        " references.",
        f"{len(train)} training and {len(test)} held-out pairs, {config.steps} steps of"
        f" {config.batch}, {task.vocabulary} ids, judged in {config.eval_precision} with"
        f" {config.beams} beam(s).",
        f"A slice with * has its whole 95 % interval over pairs below zero. Took"
        f" {time.perf_counter() - begun:.0f} s on {launch.machine()}.",
    ]
    finetune_report.write(config.out, found, counted, arms, notes, "nats/token")


def verdict(arm: finetune_report.Arm, reference: finetune_report.Arm) -> str:
    """The gaps of an arm in words: inside the noise of paired seeds, or not."""
    parts = []
    for name in ("cer", "exact"):
        gaps = finetune_report.gap_points(arm, reference, name)
        mean, half = interval(gaps)
        noise = "inside the noise" if abs(mean) <= half else "outside the noise"
        noise = "one seed, so no interval" if np.isnan(half) else noise
        parts.append(f"{name} {finetune_report.above(gaps)} points ({noise})")
    return f"{arm.label} from {reference.label}, paired seeds: {', '.join(parts)}."


if __name__ == "__main__":
    launch.command(main, Config)
