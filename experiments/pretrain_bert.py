"""What does a low precision cost BERT's pre-training? Masked tokens and next sentences at once.

An encoder learns both tasks of BERT on text, in several precisions, judged against counting.
With the gradients of the two one sees who pulls the shared weights, and whether that changes.

Run:       python experiments/pretrain_bert.py
           python experiments/pretrain_bert.py --data FOLDER --lengths 128 --next-weight 0.5
           python experiments/pretrain_bert.py --export runs/bert
           python experiments/finetune_classifier.py --checkpoint runs/bert/fp32 --lengths 32 64
Expected:  in fp32 masked tokens are told 1.7 times as often as by the most frequent token (7.9 %
           against 4.6 %, 3 seeds, 9 minutes on 2 cores), in bf16 and fp16 as often within noise,
           with held-out losses within 0.3 %. Next sentences need many more steps: in so short a run
           they stay near chance (58 %), below what a count of the words that two segments share
           tells (75 %).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from common import (
    finetune,  # sets XLA flags before JAX starts
    finetune_report,
    launch,
)
from common.datasets.sources import DOCUMENTS
from common.segments import pairs, pieces_of
from mpjax.data import (
    Batch,
    Example,
    eval_batches,
    read_documents,
    split_documents,
)
from mpjax.data.buckets import IGNORE
from mpjax.data.masking import masking
from mpjax.errors import ConfigError
from mpjax.files import write_text
from mpjax.models.hf import check_export, save_checkpoint
from mpjax.report import gaps, interval, length_slices
from mpjax.tasks import MaskedLanguage
from mpjax.typing import Params


@dataclasses.dataclass(frozen=True)
class Config(finetune.Tuning):
    """Pre-train BERT in several precisions."""

    checkpoint: str = "none"
    """`none` begins anew; an asset, a folder or a Hub name is trained on, heads included."""
    precision: tuple[str, ...] = ("fp32", "bf16", "fp16")
    """Precisions, or schedules such as late:fp8:bf16:0.2; others are compared with the first."""
    lengths: tuple[int, ...] = (64,)
    """Tokens that pairs of segments are padded to; a segment fills half of the longest."""
    vocabulary: int = 1000
    """Ids of the tokenizer, which is then trained on the training texts."""
    dropout: float = 0.0
    """Rate in training."""
    steps: int = 500
    """Steps a run."""
    lr: float = 1e-3
    """Peak learning rate; at 5e-3 the encoder learns nothing but how frequent tokens are."""
    WARMUP: ClassVar[int] = 50
    warmup: launch.Warmup = None
    """Steps of linear warm-up; by default 50, or half of the steps if these are fewer."""
    data: str = "stdlib"
    """`stdlib`, `janeausten`, a text file, a folder, FILE.jsonl:COLUMN, FILE.parquet:COLUMN or
    hf:NAME."""
    lines: int = 100
    """Lines with text of a document at most; longer ones are cut. A line counts as a sentence."""
    documents: int = 500
    """Documents of each side at most, drawn at random."""
    mask_rate: float = 0.15
    """Share of the tokens that are to be told."""
    masked_weight: float = 1.0
    """Weight of the masked tokens in the loss."""
    next_weight: float = 1.0
    """Weight of the next sentences in the loss."""
    eval_batches: int = 16
    """Batches of held-out pairs that judge a run, evenly spread."""
    export: str = ""
    """New folder for each arm's first weights and tokenizer, which `--checkpoint` reads."""
    out: Path = Path("runs/pretrain_bert")
    """Folder of the report and of all runs."""


def shared(examples: Sequence[Example]) -> np.ndarray:
    """The share of the second segment's tokens that the first one holds too."""
    return np.array(
        [np.isin(e["ids"][e["types"] == 1], e["ids"][e["types"] == 0]).mean() for e in examples]
    )


def counting(
    train: Sequence[Example], held_out: Sequence[Example], targets: np.ndarray, counts: np.ndarray
) -> dict[str, float]:
    """Scores of the most frequent token, and of a threshold on the words that segments share."""
    sides = [(shared(side), np.array([e["next"] for e in side])) for side in (train, held_out)]
    share, labels = sides[0]
    # Of candidates for the threshold, the one that serves the training side best.
    hits = {t: ((share <= t) == labels).mean() for t in np.quantile(share, np.linspace(0, 1, 51))}
    share, labels = sides[1]
    right = ((share <= max(hits, key=lambda t: hits[t])) == labels).mean()
    return {"accuracy": float((targets == counts.argmax()).mean()), "next accuracy": float(right)}


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    finetune.check(config)
    launch.positive(config, "lines", "documents", "eval_batches")
    if (longest := max(config.lengths)) < 5:
        raise ConfigError(f"lengths: {longest} has no room for a pair of segments; give 5 or more")
    task = MaskedLanguage(config.masked_weight, config.next_weight)
    if len(task.weights) < 2:
        raise ConfigError("next_weight, masked_weight: both tasks are compared; give both a weight")
    folder = Path(config.export).expanduser()
    if config.export:
        check_export(folder)
    begun = time.perf_counter()
    documents = read_documents(config.data, sources=DOCUMENTS)
    sides = [pieces_of(side, config) for side in split_documents(documents)]
    start = finetune.Start(config, "pretrain", 2, [" ".join(lines) for lines in sides[0]])
    pieces = start.pieces()
    mask = masking(pieces, config.mask_rate)
    train, held_out = (
        pairs(side, lines, pieces, config)
        for side, lines in zip(("training", "held out"), sides, strict=True)
    )
    judged = finetune.check_arms(config, task, start, pieces.vocab_size)
    launch.writable(config.out)
    most = min(len(held_out), config.batch * config.eval_batches)
    held_out = [held_out[i] for i in np.linspace(0, len(held_out) - 1, most).astype(int)]
    draw = np.random.default_rng(0)
    batches: list[Batch] = [
        mask({name: x[: len(rows)] for name, x in batch.items()}, draw)
        for rows, batch in eval_batches(held_out, batch=config.batch, lengths=config.lengths)
    ]
    targets = np.concatenate([b["labels"][b["labels"] != IGNORE] for b in batches])
    counts = np.bincount(np.concatenate([e["ids"] for e in train]), minlength=pieces.vocab_size)
    counts[[pieces.pad, pieces.first, pieces.separator]] = 0  # never masked
    measure, shares = task.judge(judged), task.gradient_shares(judged)

    def judge(params: Params) -> tuple[dict[str, float], np.ndarray]:
        found, right = measure(params, batches)
        pull = shares(params, batches[0])
        scores = found | {"accuracy": found["masked accuracy"], "loss": found["masked"]}
        scores |= {f"gradient, {name}": pull[name] for name in task.weights}
        return scores | {"cosine": pull["cosine"]}, right["masked"]

    def keep(label: str, seed: int, model: finetune.Network, params: Params) -> None:
        if config.export and seed == 0:
            own = folder / label.replace(":", "_").replace("/", "_")
            save_checkpoint(own, model, params)
            write_text(own / "tokenizer.json", pieces.to_text())

    first = judge(start.params(judged, 0))[0]
    arms = [
        finetune.run_arm(
            label, config, task, start, train, pieces.vocab_size, judge, config.out, keep, mask,
            again=lambda label, seed: bool(config.export) and seed == 0,
        )
        for label in config.precision
    ]  # fmt: skip
    counted = {"counting": counting(train, held_out, targets, counts)}
    extra = ("next accuracy", *(f"gradient, {name}" for name in task.weights))
    title = f"{config.data}: masked tokens and next sentences by precision"
    slices = {"count": length_slices(counts[targets].tolist(), unit="times in training")}
    found = finetune_report.tables(title, counted, arms, extra, slices)
    notes = ["Accuracy and held-out loss without a name are those of masked tokens, all in %."]
    for arm in arms[1:]:
        both = {name: gaps(arm.score(name), arms[0].score(name)) for name in task.weights}
        means = {name: interval(values) for name, values in both.items()}
        text = ", ".join(f"{name} {m:+.2f} ± {h:.2f} %" for name, (m, h) in means.items())
        notes.append(
            f"{arm.label}: held-out losses against {arms[0].label}: {text} (95 % interval over"
            f" {config.seeds} seeds)."
        )
    notes += [
        f"Gradients: share of each task's norm in what both reach, judged in"
        f" {config.eval_precision}. Before training {100 * first['gradient, masked']:.0f} % masked,"
        f" cosine {first['cosine']:+.2f}; after it, in {arms[0].label},"
        f" {np.mean(arms[0].score('cosine')):+.2f}.",
        f"{len(train)} training and {len(held_out)} held-out pairs, {len(targets)} masked tokens,"
        f" {config.steps} steps of {config.batch}, vocabulary {pieces.vocab_size}.",
        f"Took {time.perf_counter() - begun:.0f} s on {launch.machine()}.",
    ]
    finetune_report.write(config.out, found, counted, arms, notes, "nats, both tasks")


if __name__ == "__main__":
    launch.command(main, Config)
