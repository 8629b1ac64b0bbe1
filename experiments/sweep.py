"""Precisions x learning rates x any setting x seeds: which precision is best at its best?

An equal learning rate misleads: a precision may only look worse because it wants another rate.

Run:       python experiments/sweep.py --precision fp32 bf16 pure-bf16 --lr 3e-4 1e-3 3e-3
           python experiments/sweep.py --sweep layers=2,4 --sweep optimizer=adamw,lion --seeds 3
           python experiments/sweep.py --import my_recipes.py --precision fp32 mine
Resume:    the same command, after Ctrl-C, a kill or with more values: runs that have ended are
           taken, the others trained. A run of other settings is never overwritten.
Output:    the table of `make demo`, one arm per combination, and per precision the best, its gap
           paired by seed; runs/sweep/report.md with the plots, a run folder per arm and seed. Runs
           that stopped or diverged are listed, and the sweep goes on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

from common import (
    finished,
    launch,  # sets XLA flags before JAX starts
)

import jax  # isort: skip
import numpy as np
import optax
import tyro
from rich.console import Console

from common.datasets.sources import DOCUMENTS
from common.grid import Changes, parse_grid, products, words
from mpjax.data import Corpus, batches, load_corpus, validation_batches
from mpjax.errors import ConfigError, TrainingStopped
from mpjax.models import Decoder, Recurrent
from mpjax.ops import Objective, weight_sum
from mpjax.optim import make_optimizer, wrap
from mpjax.precision import Precision, get_precision
from mpjax.report import (
    Outcome,
    interval,
    plot_loss,
    plot_loss_scale,
    rich_table,
    save_plot,
    write_report,
)
from mpjax.train import (
    TrainStep,
    build,
    bytes_per_parameter,
    check_batch,
    fit,
    manifest,
    parse_mesh,
)
from mpjax.train.report import how_products_run
from mpjax.typing import Array, Batch, Json, ModelState, Params, PyTree, Settings

console = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Training:
    """How a language model is trained on text, whatever model and precision."""

    data: str = "stdlib"
    """`stdlib`, `janeausten`, a text file, a folder, FILE.jsonl:COLUMN, FILE.parquet:COLUMN or
    hf:NAME."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe:SIZE` or a tokenizer.json."""
    layers: int = 2
    """Layers of the model."""
    width: int = 128
    """Width of the model."""
    batch: int = 8
    """Sequences a step."""
    seq: int = 128
    """Tokens a sequence."""
    steps: int = 150
    """Steps a run."""
    optimizer: str = "adamw"
    """`adamw`, `sgd`, `lion`, `adafactor` or `one-bit-adam`."""
    schedule: str = "linear"
    """`constant`, `linear`, `cosine` or `wsd`."""
    WARMUP: ClassVar[int] = 20
    warmup: launch.Warmup = None
    """Steps of linear warm-up; by default 20, or half of the steps if these are fewer."""
    weight_decay: float = 0.0
    """Decoupled, on matrices."""
    clip: float = 1.0
    """Largest global gradient norm, in every arm at natural scale."""
    eval_batches: int = 32
    """Batches of held-out text that judge a run, evenly spread."""
    mesh: str = ""
    """Devices by axis, such as data=2,fsdp=2; one device by default."""
    diloco: str = ""
    """Replicas of the axis data train apart and meet: every=20,lr=0.7,momentum=0.9."""
    fresh: bool = False
    """Train again the runs that --out holds; without it those that have ended are taken as they
    are, so that an interrupted comparison goes on."""
    CHOOSING: ClassVar[tuple[str, ...]] = ("seeds", "precision")
    """Settings that choose among runs and change none of them."""

    @property
    def extent(self) -> str:
        """Steps, batch and model in words."""
        return (
            f"{self.steps} steps of {self.batch} x {self.seq} tokens, {self.layers} layers of width"
            f" {self.width}"
        )


@dataclasses.dataclass(frozen=True)
class Workload(Training):
    """What is trained, whatever the precision: a decoder."""

    model: str = "tiny"
    """Model size by name."""
    heads: int = 4
    """Attention heads."""


LanguageModel = Decoder | Recurrent
Make = Callable[[Any, Corpus, Precision], LanguageModel]  # workload, corpus, precision -> model


@dataclasses.dataclass(frozen=True)
class Arm:
    """One setting of a comparison.

    Args:
      label: shown in the table.
      precision: of the training; results are judged in float32.
      lr: peak learning rate.
      reference: label of the arm that it is compared with.
      stress: k; the loss is multiplied by 2^-k and its gradients by 2^k, which an exact arithmetic
        does not notice.
      changes: settings of the workload that are others here.
    """

    label: str
    precision: Precision
    lr: float
    reference: str
    stress: int = 0
    changes: Changes = ()

    def work(self, work: Training) -> Any:
        """Returns the workload of this arm."""
        changes: Any = dict(self.changes)
        return dataclasses.replace(work, **changes)


@dataclasses.dataclass(frozen=True)
class Config(Workload):
    """Train one model under several precisions, learning rates and more, with several seeds."""

    precision: tuple[str, ...] = ("fp32", "bf16", "fp16", "pure-bf16")
    """Presets, policies or lines of text; the first is what the others are compared with."""
    lr: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    """Peak learning rates."""
    seeds: int = 3
    """Seeds an arm; the n-th seed has the same initial weights and batches in every arm."""
    sweep: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUE,VALUE of any setting above, such as layers=2,4; repeatable, all combinations are
    trained. Values that hold commas are separated by |."""
    out: Path = Path("runs/sweep")
    """Folder of the report and of all runs."""
    CHOOSING = (*Training.CHOOSING, "sweep")
    FIXED: ClassVar[tuple[str, ...]] = ("seeds", "fresh", "mesh", "eval_batches", "sweep", "out")
    """Settings that cannot be varied: those of the whole sweep, and what judges all runs alike."""


def judge(model: LanguageModel, corpus: Corpus, work: Training) -> Callable[[Params], float]:
    """Returns a function from weights to the validation loss, computed in float32."""
    exact = dataclasses.replace(model, precision=get_precision("fp32"))
    loss = jax.jit(lambda params, batch: exact.loss(params, batch)[0])
    held_out = list(
        validation_batches(
            corpus.validation, batch=work.batch, seq=work.seq, limit=work.eval_batches
        )
    )
    return lambda params: float(np.mean([loss(params, batch) for batch in held_out]))


def optimizer(arm: Arm, work: Training) -> optax.GradientTransformation:
    """Returns the raw optimizer of an arm."""
    return make_optimizer(
        work.optimizer, arm.lr, schedule=work.schedule, steps=work.steps,
        warmup=launch.warmup(work), weight_decay=work.weight_decay,
    )  # fmt: skip


def stressed(
    stress: int, work: Training, raw: optax.GradientTransformation
) -> tuple[optax.GradientTransformation, Callable[[LanguageModel], Objective]]:
    """Returns the optimizer and objective with the loss multiplied by 2^-k."""
    # Gradients come back to their natural scale before anything looks at their size.
    tx = optax.chain(optax.scale(2.0**stress), optax.clip_by_global_norm(work.clip), raw)

    def objective(model: LanguageModel) -> Objective:
        def loss_fn(*args: PyTree, **kwargs: PyTree) -> tuple[Array, ModelState]:
            loss, state = model.loss(*args, **kwargs)
            return loss * 2.0**-stress, state

        return Objective(loss_fn, weight_sum)

    return tx, objective


Again = Callable[[str, int], bool]  # label, seed -> whether a run that has ended is trained again


def page_of(
    arm: Arm, work: Training, model: LanguageModel, seed: int, out: Path, again: Again
) -> tuple[Path, Settings]:
    """Returns the folder of a run and its manifest."""
    folder = out / arm.label.replace(" ", "_") / f"seed{seed}"
    settings = launch.settings(work, lr=arm.lr, stress=arm.stress, seed=seed, out=str(folder))
    for name in ("mesh", "diloco"):  # so that runs from before they existed are the same
        if not settings[name]:
            del settings[name]
    settings["fresh"] = work.fresh or again(arm.label, seed)
    found = how_products_run(model.recipes.values(), work.batch * work.seq)
    return folder, manifest(arm.precision, settings, model.paths, found)


def train(
    arm: Arm, work: Training, step: TrainStep, data: Iterator[Batch], seed: int, folder: Path,
    page: Settings, evaluate: Callable[[Params], float],
) -> tuple[Settings, list[Settings], Params]:  # fmt: skip
    """Trains one run; returns its outcome, a record a step, and its weights, None if it stopped."""
    label, params = f"{arm.label}, seed {seed}", None
    with finished.recording(
        folder, page, arm.precision.to_text(), label, work.steps, console,
        lambda record: record | {"loss": record["loss"] * 2.0**arm.stress},
    ) as (writer, report, history):  # fmt: skip
        assert step.init is not None
        state = step.init(seed)
        outcome: Settings = {
            "validation_loss": np.inf,
            "bytes_per_parameter": bytes_per_parameter(state),
        }
        try:
            params = fit(state, step, data, steps=work.steps, report=report).params
            outcome["validation_loss"] = evaluate(params)
        except TrainingStopped as error:  # the other arms go on
            outcome["stopped"] = str(error)
            console.print(f"{label} stopped: {error}", style="red", highlight=False)
    writer.write({"step": work.steps, "validation_loss": outcome["validation_loss"]})
    writer.close()
    return outcome, history, params


def run_arm(
    arm: Arm,
    work: Training,
    corpus: Corpus,
    seeds: int,
    out: Path,
    evaluate: Callable[[Params], float],
    keep: Callable[[str, int, Params, Batch], None] = lambda *_: None,
    enough: Callable[[str, Sequence[float]], bool] = lambda *_: False,
    first: int = 0,
    make: Make = launch.make_decoder,
    again: Again = lambda *_: False,
) -> Outcome:
    """Trains one arm under each seed and returns its outcome; the step is compiled once.

    Args:
      arm: what to train.
      work: what on.
      corpus: its text.
      seeds: how many.
      out: folder in which each run gets its own.
      evaluate: weights -> validation loss.
      keep: called with (label, seed, weights, a batch) at the end of each run.
      enough: asked with (label, losses so far) after each seed; True leaves out the rest.
      first: the first seed.
      make: builds the model.
      again: (label, seed) -> whether a run that has ended is trained again: `keep` needs it.
    """
    model = make(work, corpus, arm.precision)
    tx, objective = stressed(arm.stress, work, optimizer(arm, work))
    mesh = parse_mesh(work.mesh) if work.mesh else None
    _, step = build(model, tx, mesh, objective=objective, diloco=work.diloco or None)
    losses, records, per_parameter = [], [], 0.0
    for seed in range(first, first + seeds):
        folder, page = page_of(arm, work, model, seed, out, again)
        if ended := finished.begin(folder, page, work.CHOOSING, console):
            outcome, history = ended
        else:
            data = batches(corpus.train, batch=work.batch, seq=work.seq, seed=seed)
            outcome, history, params = train(arm, work, step, data, seed, folder, page, evaluate)
            if params is not None:
                keep(arm.label, seed, params, next(data))
            finished.end(folder, outcome)
        # a run that stopped has no losses to its end
        history += [history[-1] | {"loss": np.inf}] * (work.steps - len(history))
        losses.append(outcome["validation_loss"])
        per_parameter = outcome["bytes_per_parameter"]
        records.append(history)
        if enough(arm.label, losses):
            break
    return finished.outcome_of(arm.label, arm.reference, losses, records, per_parameter)


def run_arms(
    arms: Sequence[Arm],
    work: Training,
    seeds: int,
    out: Path,
    make: Make = launch.make_decoder,
    first: int = 0,
    again: Again = lambda *_: False,
    **options: Json,
) -> list[Outcome]:
    """Trains all arms, each under the same seeds; a run that has ended in `out` is taken."""
    corpora: dict[tuple[str, str], Corpus] = {}
    each: list[tuple[Arm, Any, Corpus, LanguageModel]] = []
    for arm in arms:  # the last arm's mistake, before the first
        own = arm.work(work)
        if (text := (own.data, own.tokenizer)) not in corpora:
            corpora[text] = load_corpus(*text, sources=DOCUMENTS)
        corpus = corpora[text]
        batches(corpus.train, batch=own.batch, seq=own.seq, seed=0)
        if own.mesh:
            check_batch(own.batch, 1, parse_mesh(own.mesh))
        model = make(own, corpus, arm.precision)
        wrapped = wrap(optimizer(arm, own), arm.precision)
        jax.eval_shape(lambda key, m=model, w=wrapped: w.init(m.init(key)), jax.random.key(0))
        for seed in range(first, first + seeds):
            finished.check(*page_of(arm, own, model, seed, out, again), work.CHOOSING)
        each.append((arm, own, corpus, model))
    launch.writable(out)
    options |= {"make": make, "first": first, "again": again}
    judges: dict[Any, Callable[[Params], float]] = {}
    outcomes = []
    for arm, own, corpus, model in each:
        # Arms of one model and text share a judge, and all read as many sequences.
        shape = (model.config, own.data, own.tokenizer, own.seq)
        if shape not in judges:
            judges[shape] = judge(model, corpus, dataclasses.replace(own, batch=work.batch))
        outcomes.append(run_arm(arm, own, corpus, seeds, out, judges[shape], **options))
    return outcomes


def best(outcomes: Sequence[Outcome], labels: Sequence[str]) -> str:
    """Returns the label of the arm with the lowest mean validation loss."""
    chosen = [o for o in outcomes if o.label in labels]
    means = {o.label: interval(o.validation_loss)[0] for o in chosen}
    return min(means, key=lambda label: (np.isnan(means[label]), means[label]))


def arms_of(config: Config) -> dict[str, list[Arm]]:
    """Returns precision -> its arms: each combination of learning rate and other settings.

    Raises:
      ConfigError: a setting that cannot be varied, or two arms of one label.
    """
    grid: dict[str, Any] = dict(parse_grid(config.sweep, config, config.FIXED))
    for name in ("precision", "lr"):
        own = getattr(config, name)
        if name in grid and own != getattr(type(config), name):
            raise ConfigError(f"sweep: {name}={grid[name]} and --{name} {own}; give one of them")
        grid.setdefault(name, own)
    texts, rates = grid.pop("precision"), grid.pop("lr")
    launch.distinct(dataclasses.replace(config, precision=texts), "precision")
    found: dict[str, list[Arm]] = {}
    for text in texts:
        precision, found[text] = get_precision(text), []
        for lr in rates:
            for changes in products(grid):
                label = f" lr={lr:g}{words(changes)}"
                one = Arm(text + label, precision, lr, texts[0] + label, changes=changes)
                check(dataclasses.replace(one.work(config), lr=(lr,)))
                found[text].append(one)
    labels = [arm.label for arms in found.values() for arm in arms]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"sweep: two arms are called {twice[0]!r}; give values that differ more")
    return found


def check(config: Config) -> None:
    """Checks the numbers of one arm."""
    launch.positive(config, "batch", "seq", "steps", "eval_batches", "clip", "lr", "seeds")


def failures(outcomes: Sequence[Outcome], out: Path) -> list[str]:
    """Returns a line for each run that stopped or diverged."""
    found = []
    for outcome in outcomes:
        for seed, loss in enumerate(outcome.validation_loss):
            if not np.isfinite(loss):
                folder = out / outcome.label.replace(" ", "_") / f"seed{seed}"
                why = finished.stopped(folder) or f"its validation loss is {loss}"
                found.append(f"{outcome.label}, seed {seed}: {why}")
    return found


def at_the_edge(label: str, arms: Sequence[Arm]) -> str:
    """Returns what to say of a best arm whose learning rate is the smallest or largest of all."""
    rates = sorted({arm.lr for arm in arms})
    (lr,) = {arm.lr for arm in arms if arm.label == label}
    if len(rates) < 3 or lr not in (rates[0], rates[-1]):
        return ""
    side = "smaller" if lr == rates[0] else "larger"
    return f"{label}: its rate is at the edge of the grid; a {side} one may be better."


def main(config: Config) -> None:
    """Runs the sweep and writes its report."""
    check(config)
    launch.not_empty(config, "precision", "lr")
    start = time.perf_counter()
    arms = arms_of(config)
    outcomes = run_arms([arm for own in arms.values() for arm in own], config, config.seeds,
                        config.out)  # fmt: skip
    winners = {text: best(outcomes, [arm.label for arm in own]) for text, own in arms.items()}
    tuned = [
        dataclasses.replace(
            o, label=f"best: {o.label}", reference=f"best: {next(iter(winners.values()))}"
        )
        for label in winners.values()
        for o in outcomes
        if o.label == label
    ]
    launch.wide().print(rich_table([*outcomes, *tuned], "Precisions and learning rates"))
    save_plot(plot_loss(outcomes), config.out / "loss.png")
    save_plot(plot_loss_scale(outcomes), config.out / "loss_scale.png")
    notes = [f"Failed: {line}" for line in failures(outcomes, config.out)]
    notes += filter(None, [at_the_edge(winners[text], own) for text, own in arms.items()])
    for note in notes:
        launch.wide().print(note, highlight=False, markup=False)
    notes.append(f"Took {time.perf_counter() - start:.0f} s on {launch.machine()}.")
    path = write_report(
        config.out, "Precisions and learning rates", [*outcomes, *tuned], notes,
        ["loss.png", "loss_scale.png"],
    )  # fmt: skip
    launch.wide().print(f"report: {path}")


if __name__ == "__main__":
    launch.command(main, Config)
