"""What does a run lose, and what does it save, where replicas send narrow gradients?

One decoder on real text, eight replicas; each form of compression with error feedback, and each at
the learning rate that is best for it: an equal rate misleads.

Run:       python experiments/compress_gradients.py
           python experiments/compress_gradients.py --compression none int8@256 int8@64 --lr 2e-3
           python experiments/compress_gradients.py --mesh data=4,fsdp=2 --precision bf16
Expected:  the figures of docs/guides/compress.md. A CPU stands for the eight devices; on two cores
           a run takes some minutes, and those that ended are taken.
Output:    the table with what is sent, runs/compress/report.md with the plots, a run folder per arm
           and seed.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import sweep

from common import launch  # sets XLA flags before JAX starts

import jax  # isort: skip

from common.datasets.sources import DOCUMENTS
from common.grid import Changes
from mpjax.data import load_corpus
from mpjax.errors import ConfigError
from mpjax.markdown import table
from mpjax.models import decoder
from mpjax.optim import Exchange
from mpjax.precision import Compression, Precision, get_precision
from mpjax.report import Outcome, interval, plot_loss, plot_sent, save_plot, write_report
from mpjax.train import DiLoCo, parse_mesh


@dataclasses.dataclass(frozen=True)
class Config(sweep.Workload):
    """Compare compressions of gradients between replicas on one small decoder."""

    precision: str = "fp32"
    """Of everything but what is sent: a preset, a policy or a line of text."""
    compression: tuple[str, ...] = (
        "none", "bf16", "int8@256", "e4m3@256", "topk:0.01", "powersgd:4",
        "sign@1024,momentum=0.9", "int8@256,prune=0.75",
    )  # fmt: skip
    """The first is what the others are compared with. A form with the momentum of signs trains with
    1-bit Adam, and both with the steps of warm-up of the learning rate. `int4@128 every=20` sends
    how far replicas have come, every 20th step."""
    lr: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    """Peak learning rates; each form is shown at its best one."""
    tuned_on: int = 1
    """Seeds that choose the rate; the best one is then trained with all."""
    mesh: str = "data=8"
    """Devices by axis; those of `data` are the replicas."""
    batch: int = 16
    """Sequences a step."""
    seeds: int = 5
    """Seeds an arm; the n-th seed has the same initial weights and batches in every arm."""
    out: Path = Path("runs/compress")
    """Folder of the report and of all runs."""
    CHOOSING = (*sweep.Training.CHOOSING, "compression", "tuned_on")


def form_of(text: str) -> Compression:
    """The form that an arm sends, without how often it does."""
    return Compression.parse(text.partition(" ")[0])


def apart(text: str) -> DiLoCo | None:
    """How replicas of an arm train apart, None where they exchange every gradient."""
    _, blank, often = text.partition(" ")
    return DiLoCo.parse(often) if blank else None


def one_bit(text: str) -> bool:
    """Whether a form sends signs of momenta."""
    form = form_of(text)
    return form.kind == "sign" and form.momentum > 0


def precision_of(config: Config, text: str) -> Precision:
    """The Precision of a form."""
    form = form_of(text)
    if one_bit(text) and not form.warmup:
        form = dataclasses.replace(form, warmup=max(1, launch.warmup(config)))
    return get_precision(config.precision, compression=form)


def arms_of(config: Config, text: str, rates: Sequence[float]) -> list[sweep.Arm]:
    """The arms of one form, one a learning rate."""
    changes: Changes = (("optimizer", "one-bit-adam"),) if one_bit(text) else ()
    if meet := apart(text):
        changes = (*changes, ("diloco", str(meet)))
    precision = precision_of(config, text)
    first = config.compression[0]
    return [
        sweep.Arm(f"{text} lr={lr:g}", precision, lr, f"{first} lr={lr:g}", changes=changes)
        for lr in rates
    ]


def sent_bytes(config: Config, text: str, vocabulary: int) -> float:
    """Bytes that a replica sends in a step, on average, on a device that holds all weights."""
    model = decoder(
        config.model, "fp32", vocabulary=vocabulary, layers=config.layers, width=config.width,
        heads=config.heads, context=config.seq,
    )  # fmt: skip
    params = jax.eval_shape(model.init, jax.random.key(0))
    form, replicas = precision_of(config, text).compression, parse_mesh(config.mesh).shape["data"]
    meet = apart(text)
    if form.kind == "none":  # all in float32
        form = Compression("bf16", least=2**62)
    return Exchange(form, "data", replicas).sent_bytes(params) / (meet.every if meet else 1)


def check(config: Config) -> None:
    """Checks the settings before anything is trained."""
    launch.positive(config, "batch", "seq", "steps", "eval_batches", "clip", "lr", "seeds")
    launch.positive(config, "tuned_on")
    launch.not_empty(config, "compression", "lr")
    launch.distinct(config, "compression")
    if config.tuned_on > config.seeds:
        raise ConfigError(
            f"tuned_on: {config.tuned_on} of {config.seeds} seeds; give at most all of them"
        )
    if config.optimizer == "one-bit-adam":
        raise ConfigError(
            "optimizer: one-bit-adam is of signs alone, and comes with them; leave --optimizer out"
        )
    for text in config.compression:
        if form_of(text).kind != "none" or apart(text) is not None:
            Exchange(Compression("bf16"), "data", parse_mesh(config.mesh).shape["data"])
        precision_of(config, text)


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    launch.host_devices(config.mesh)
    check(config)
    start = time.perf_counter()
    vocabulary = load_corpus(config.data, config.tokenizer, sources=DOCUMENTS).tokenizer.vocab_size
    sent = {text: sent_bytes(config, text, vocabulary) for text in config.compression}
    every = {text: arms_of(config, text, config.lr) for text in config.compression}
    tried: list[Outcome] = []
    if len(config.lr) > 1:
        arms = [arm for own in every.values() for arm in own]
        tried = sweep.run_arms(arms, config, config.tuned_on, config.out)
    chosen: list[sweep.Arm] = []
    for own in every.values():
        label = sweep.best(tried, [arm.label for arm in own]) if tried else own[0].label
        chosen += [arm for arm in own if arm.label == label]
    outcomes = sweep.run_arms(
        [dataclasses.replace(arm, reference=chosen[0].label) for arm in chosen], config,
        config.seeds, config.out,
    )  # fmt: skip
    first = outcomes[0]
    rows = []
    for text, arm, outcome in zip(config.compression, chosen, outcomes, strict=True):
        mean, half = interval(outcome.validation_loss)
        pairs = zip(outcome.validation_loss, first.validation_loss, strict=True)
        gap, around = interval([100 * (a / b - 1) for a, b in pairs])
        bytes_, share = sent[text], sent[text] / sent[config.compression[0]]
        rows.append([
            text, f"{arm.lr:g}", f"{mean:.4f} ± {half:.4f}",
            "–" if outcome is first else f"{gap:+.2f} ± {around:.2f}", f"{bytes_ / 1e6:.3f}",
            f"{share:.3f}", f"{outcome.tokens_per_s:,.0f}",
        ])  # fmt: skip
    head = ["compression", "lr", "validation loss", "gap, %", "MB sent a step", "of the first's",
            "tokens/s"]  # fmt: skip
    launch.wide().print(table(head, rows), highlight=False, markup=False)
    by_form = {o.label: sent[text] for text, o in zip(config.compression, outcomes, strict=True)}
    save_plot(plot_sent(outcomes, by_form), config.out / "sent.png")
    save_plot(plot_loss(outcomes), config.out / "loss.png")
    edges = [
        sweep.at_the_edge(arm.label, own) for arm, own in zip(chosen, every.values(), strict=True)
    ]
    notes = [
        table(head, rows),
        f"Bytes are those that one replica of {config.mesh} sends if a device holds all weights,"
        " rings counted; ± is the 95 % interval over seeds, which are paired.",
        *filter(None, edges),
        f"{config.seeds} seeds, {config.extent}, {config.data} as {config.tokenizer}, rates tried"
        f" on {config.tuned_on}: {' '.join(f'{lr:g}' for lr in config.lr)}."
        f" Took {time.perf_counter() - start:.0f} s on {launch.machine()}.",
    ]
    path = write_report(
        config.out, "Compressed gradients", outcomes, notes, ["sent.png", "loss.png"]
    )
    launch.wide().print(f"report: {path}")


if __name__ == "__main__":
    launch.command(main, Config)
