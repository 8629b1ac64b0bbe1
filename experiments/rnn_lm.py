"""Does a recurrent language model train in 16 bits? LSTM or GRU on real text, paired seeds.

The products of a cell run low; its gates and its memory are float32 under bf16 and fp16, and low
too in the arm `bf16, state bf16`, which says so with the rule `**/cell/state=bf16`.

Run:       python experiments/rnn_lm.py                  (and with --cell gru)
Expected:  bf16 and fp16 within 0.5 % of fp32's validation loss; docs/evidence/rnn_lm.md has the
           intervals, and those of the low state.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import sweep

from common import launch  # sets XLA flags before JAX starts

import jax  # isort: skip
import numpy as np

from common.datasets.sources import DOCUMENTS
from mpjax.data import Corpus, load_corpus
from mpjax.models import Recurrent, recurrent
from mpjax.precision import Precision, get_precision
from mpjax.report import Outcome, gap, plot_loss, rich_table, save_plot, write_report

BAR = 0.5  # percent
LOW_STATE = "bf16, state bf16"
ARMS = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
    LOW_STATE: "bf16 rule:**/cell/state=bf16",
}


@dataclasses.dataclass(frozen=True)
class Config(sweep.Training):
    """Compare precisions on one recurrent language model."""

    cell: str = "lstm"
    """`lstm` or `gru`."""
    precision: tuple[str, ...] = tuple(ARMS)
    """Arms by name, or presets, policies and lines of text; the first is the reference."""
    layers: int = 1
    """Cells above each other."""
    steps: int = 300
    """Steps a run."""
    lr: float = 1e-2
    """Peak learning rate."""
    seeds: int = 5
    """Seeds an arm; the n-th has the same initial weights and batches in every arm."""
    out: Path = Path("runs/rnn_lm")
    """Folder of the report and of all runs."""


def make(config: Config, corpus: Corpus, precision: Precision) -> Recurrent:
    """Returns the model with the vocabulary of the tokenizer."""
    return recurrent(
        "tiny", precision, vocabulary=corpus.tokenizer.vocab_size, layers=config.layers,
        width=config.width, cell=config.cell,
    )  # fmt: skip


def carried_loss(config: Config, params: object) -> tuple[float, float]:
    """Held-out loss of one long passage, read in windows: with and without the memory carried on.

    Args:
      params: weights.

    Returns:
      Both losses, nats a token.
    """
    corpus = load_corpus(config.data, config.tokenizer, sources=DOCUMENTS)
    model = make(config, corpus, get_precision("fp32"))
    windows = min(config.eval_batches, (len(corpus.validation) - 1) // config.seq)
    ids = np.asarray(corpus.validation[: windows * config.seq + 1], np.int32)
    loss = jax.jit(lambda batch, state: model.loss(params, batch, state=state))
    losses: dict[bool, list[float]] = {True: [], False: []}
    for carried, found in losses.items():
        state = model.init_cache(1)
        for n in range(windows):
            part = ids[n * config.seq : (n + 1) * config.seq + 1][None]
            one, after = loss({"inputs": part[:, :-1], "targets": part[:, 1:]}, state)
            state = after if carried else state
            found.append(float(one))
    return float(np.mean(losses[True])), float(np.mean(losses[False]))


def verdict(outcome: Outcome, reference: Outcome) -> str:
    """The gap of an arm in words."""
    mean, half = gap(outcome, reference)
    whole = f"{outcome.label}: {mean:+.3f} % of {reference.label}'s loss"
    if np.isnan(half):
        return f"{whole}, one seed: no interval."
    inside = "inside" if abs(mean) + half <= BAR else "not inside"
    return f"{whole}, 95 % interval ± {half:.3f}, {inside} of ± {BAR} %."


def compare(config: Config) -> tuple[list[Outcome], list[str]]:
    """Trains all arms and writes the report; returns outcomes, the reference first, and notes."""
    start = time.perf_counter()
    first = config.precision[0]
    arms = [
        sweep.Arm(name, get_precision(ARMS.get(name, name)), config.lr, first)
        for name in config.precision
    ]
    kept: dict[str, object] = {}

    def keep(label: str, seed: int, params: object, batch: object) -> None:
        del batch
        if label == first and not seed:
            kept["params"] = params

    outcomes = sweep.run_arms(
        arms, config, config.seeds, config.out, make=make, keep=keep,
        again=lambda label, seed: label == first and not seed,
    )  # fmt: skip
    title = f"One {config.cell.upper()}, several precisions"
    launch.wide().print(rich_table(outcomes, title))
    on, off = carried_loss(config, kept["params"])
    notes = [verdict(outcome, outcomes[0]) for outcome in outcomes[1:]]
    notes.append(
        f"Memory carried from window to window, {first}, seed 0: {on:.4f} nats a token on one"
        f" passage of held-out text, {off:.4f} when every window begins at zero."
    )
    launch.wide().print("\n".join(notes))
    notes.append(
        f"{config.seeds} seeds, {config.extent}, lr {config.lr:g} {config.schedule},"
        f" {config.data} as {config.tokenizer}. Took {time.perf_counter() - start:.0f} s on"
        f" {launch.machine()}."
    )
    save_plot(plot_loss(outcomes), config.out / "loss.png")
    launch.wide().print(f"report: {write_report(config.out, title, outcomes, notes, ['loss.png'])}")
    return outcomes, notes


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    launch.positive(config, "batch", "seq", "steps", "eval_batches", "clip", "lr", "seeds")
    launch.not_empty(config, "precision")
    launch.distinct(config, "precision")
    compare(config)


if __name__ == "__main__":
    launch.command(main, Config)
