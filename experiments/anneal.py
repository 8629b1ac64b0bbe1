"""Does simulated annealing beside gradient descent beat descent alone, for as many operations?

A language model or an image network learns under tuned AdamW, under hybrids of it with proposals
that are accepted or rejected by their loss, and under proposals alone. An arm takes as many steps
as cost what AdamW's cost: a forward pass counts a third of a gradient step. Each arm has one number
that is tuned, from as many values, by one seed more than are compared.

Run:       python experiments/anneal.py
           python experiments/anneal.py --task cnn --lr 1e-3 3e-3 1e-2 3e-2
           python experiments/anneal.py --precision fp32 bf16 fp16 --methods descent alternate
Expected:  a table of the held-out loss by method and precision, with its gap to AdamW in the same
           precision, seeds paired (docs/evidence/anneal.md says what it was). On two cores the
           default takes about ten minutes, of which runs that ended are kept.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from common import (
    finetune,  # sets XLA flags before JAX starts
    finetune_report,
    launch,
)

import jax  # isort: skip
import optax
from image_cnn import evaluate as image_judge

from common.datasets.sources import DOCUMENTS, IMAGES
from mpjax.data import batches, image_batches, load_corpus, load_images, validation_batches
from mpjax.errors import ConfigError
from mpjax.models import decoder, resnet
from mpjax.optim import make_optimizer, wrap
from mpjax.optim.annealing import (
    Annealing,
    affine,
    alternate,
    anneal_then_descend,
    annealed,
    gaussian,
    langevin,
    random_rate,
)
from mpjax.precision import Precision, get_precision
from mpjax.report import interval
from mpjax.tasks import Language
from mpjax.train import build, manifest
from mpjax.typing import Params, Settings

DESCENT = "descent"
# What a step costs in gradient steps: (a descent, a proposal), and what is tuned of it.
PASSES = {"alternate": 2 / 3, "first": 2 / 3, "langevin": 2.0, "sgd-sa": 4 / 3, "judged": 4 / 3}
TUNED = {
    DESCENT: "lr", "judged": "lr", "sgd-sa": "lr", "alternate": "scale", "first": "scale",
    "langevin": "scale",
}  # fmt: skip
_ASIDE = 1000  # the seed that tunes is this one


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare annealing, descent and hybrids at equal operations."""

    task: Literal["lm", "cnn"] = "lm"
    """A decoder of text, or a residual network of images."""
    data: str = ""
    """Documents (by default `stdlib`) or images (`digits`), as the other scripts take."""
    precision: tuple[str, ...] = ("fp32",)
    """Precisions; each has its own tuned AdamW, which its other arms are compared with."""
    eval_precision: str = "fp32"
    """Precision that judges all of them."""
    methods: tuple[str, ...] = (DESCENT, "alternate", "first", "langevin", "judged", "sgd-sa")
    """`descent`: AdamW; `alternate` it with Gaussian proposals; `first` these, then descend;
    alternate it with `langevin` proposals, corrected; `judged`: an update of AdamW is accepted or
    rejected; `sgd-sa`: a random learning rate of plain descent, alone."""
    layers: int = 2
    """Blocks of the decoder."""
    width: int = 64
    """Its width."""
    heads: int = 4
    """Its attention heads."""
    batch: int = 16
    """Sequences or images a step."""
    seq: int = 64
    """Tokens a sequence."""
    steps: int = 300
    """Gradient steps of AdamW; other arms take as many of theirs as cost as much."""
    lr: tuple[float, ...] = (1e-3, 3e-3, 6e-3, 1e-2)
    """Peak learning rates to tune from; of `sgd-sa` ten times as large, and a tenth to all of it
    is drawn from."""
    scale: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    """Sizes of proposals relative to a leaf's size, to tune from; `langevin` has a hundredth of
    it as its learning rate."""
    temperature: float = 1e-3
    """Where the cooling begins; it is geometric and ends at a thousandth of it."""
    descend: int = 9
    """Gradient steps before each proposal; `first` spends as large a share of its steps on them."""
    schedule: str = "linear"
    """`constant`, `linear`, `cosine` or `wsd`."""
    WARMUP: ClassVar[int] = 20
    warmup: launch.Warmup = None
    """Steps of linear warm-up; by default 20, or half of the steps if these are fewer."""
    weight_decay: float = 0.01
    """Decoupled, on matrices."""
    clip: float = 1.0
    """Largest global gradient norm."""
    seeds: int = 3
    """Seeds an arm; the n-th seed has the same new weights and batches in every arm."""
    fresh: bool = False
    """Train again the runs that --out holds; without it those that have ended are taken as they
    are, so that an interrupted comparison goes on."""
    out: Path = Path("runs/anneal")
    """Folder of the report and of all runs."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What is learned.

    Args:
      make: Precision -> model.
      data: seed -> batches.
      judge: model -> what a run is judged with.
      unit: of the loss.
    """

    make: Callable[[str | Precision], Any]
    data: finetune.Batches
    judge: Callable[[Any], finetune.Judge]
    unit: str


@dataclasses.dataclass(frozen=True)
class Beginning:
    """New weights by seed."""

    make: Callable[[str | Precision], Any]
    first: int

    def model(self, precision: str | Precision, vocabulary: int) -> Any:
        del vocabulary
        return self.make(precision)

    def params(self, model: Any, seed: int) -> Params:
        return jax.jit(model.init)(jax.random.key(self.first + seed))


def language(config: Config) -> Work:
    """A decoder of bytes."""
    corpus = load_corpus(config.data or "stdlib", "bytes", sources=DOCUMENTS)
    sizes = {"batch": config.batch, "seq": config.seq}
    batches(corpus.train, **sizes, seed=0)
    held_out = validation_batches(corpus.validation, **sizes, limit=32)

    def judge(model: Any) -> finetune.Judge:
        evaluate = Language().judge(model)
        return lambda params: (evaluate(params, held_out), np.zeros(0, bool))

    def make(precision: str | Precision) -> Any:
        return decoder(
            "tiny", precision, layers=config.layers, width=config.width, heads=config.heads,
            vocabulary=corpus.tokenizer.vocab_size, context=config.seq,
        )  # fmt: skip

    return Work(make, lambda seed: batches(corpus.train, **sizes, seed=seed), judge, "nats/token")


def images(config: Config) -> Work:
    """A residual network."""
    loaded = load_images(config.data or "digits", held_out=0.2, sources=IMAGES)
    image_batches(loaded.train, batch=config.batch, seed=0)
    channels = loaded.train["inputs"].shape[-1]

    def judge(model: Any) -> finetune.Judge:
        evaluate = image_judge(model, loaded)

        def judged(params: Params) -> tuple[dict[str, float], np.ndarray]:
            loss, accuracy = evaluate(params, None)
            return {"loss": loss, "accuracy": accuracy}, np.zeros(0, bool)

        return judged

    return Work(
        lambda precision: resnet("tiny", precision, inputs=channels, classes=loaded.classes),
        lambda seed: image_batches(loaded.train, batch=config.batch, seed=seed),
        judge, "nats/image",
    )  # fmt: skip


def extent(method: str, config: Config) -> tuple[int, int]:
    """Returns an arm's gradient steps and proposals, which cost as much as AdamW's steps."""
    if method == DESCENT:
        return config.steps, 0
    cost = PASSES[method]
    if method in ("sgd-sa", "judged"):
        return 0, max(1, round(config.steps / cost))
    cycles = config.steps / (config.descend + cost)
    return max(1, round(cycles * config.descend)), max(1, round(cycles))


def optimizer_of(method: str, config: Config) -> optax.GradientTransformation | Annealing:
    """Returns the optimizer of an arm whose numbers are chosen."""
    descents, proposals = extent(method, config)
    (lr,), (scale,) = config.lr, config.scale
    adamw = make_optimizer(
        "adamw", lr, schedule=config.schedule, steps=descents or proposals,
        warmup=min(launch.warmup(config), (descents or proposals) // 2),
        weight_decay=config.weight_decay,
    )  # fmt: skip
    if method == DESCENT:
        return adamw
    cooling = affine(config.temperature, 1e-3 ** (1 / proposals))
    if method == "sgd-sa":
        return annealed(random_rate([10 * lr * share for share in (0.1, 0.3, 1.0)]), cooling)
    if method == "judged":
        return annealed(adamw, cooling)
    proposal = langevin(scale / 100) if method == "langevin" else gaussian(scale)
    annealing = annealed(proposal, cooling)
    if method == "first":
        return anneal_then_descend(annealing, adamw, after=proposals)
    return alternate(adamw, annealing, descend=config.descend, anneal=1)


def run(
    method: str, label: str, config: Config, work: Work, folder: str = "", first: int = 0
) -> finetune_report.Arm:
    """Trains one arm in one precision under each seed; its numbers are chosen.

    Args:
      method: of the arm.
      label: its precision.
      config: the settings, with the seeds to run.
      work: what is learned.
      folder: of its runs, below --out.
      first: what is added to a seed.
    """
    own = dataclasses.replace(config, methods=(method,), steps=sum(extent(method, config)))
    start = Beginning(work.make, first)
    model = work.make(label)
    _, step = build(model, optimizer_of(method, config), clip=config.clip)

    def page(seed: int) -> tuple[Path, Settings]:
        place = config.out / folder / f"{method} {label}".replace(" ", "_") / f"seed{seed}"
        settings = launch.settings(own, seed=seed + first)
        return place, manifest(get_precision(label), settings, model.paths, {})

    name = f"{method} {label}"
    return finetune.run_seeds(
        name, f"{DESCENT} {label}", own, step, model, start,
        lambda seed: work.data(seed + first), work.judge(work.make(config.eval_precision)), page,
    )  # fmt: skip


def chosen(config: Config, **more: float) -> Config:
    """The settings with one value of each number: those given, else the first."""
    lr, scale = more.get("lr", config.lr[0]), more.get("scale", config.scale[0])
    return dataclasses.replace(config, lr=(lr,), scale=(scale,))


def tuned(method: str, label: str, config: Config, work: Work, lr: float | None) -> Config:
    """The settings of an arm with the value of its number that has the lowest loss."""
    field = TUNED[method]
    held = {"lr": lr} if lr is not None and field == "scale" else {}
    found = {}
    for value in getattr(config, field):
        one = dataclasses.replace(chosen(config, **held, **{field: value}), seeds=1)
        arm = run(method, label, one, work, f"tuning/{field}{value:g}", _ASIDE)
        found[value] = arm.scores[0]["loss"]
    best = min(found, key=lambda value: (np.isnan(found[value]), found[value]))
    return chosen(config, **held, **{field: best})


def check(config: Config) -> None:
    """Checks the settings, before anything is read."""
    launch.positive(
        config, "layers", "width", "heads", "batch", "seq", "steps", "lr", "scale", "temperature",
        "descend", "clip", "seeds",
    )  # fmt: skip
    launch.not_negative(config, "warmup", "weight_decay")
    launch.not_empty(config, "precision", "methods", "lr", "scale")
    launch.distinct(config, "precision", "methods")
    for method in config.methods:
        if method not in TUNED:
            raise ConfigError(f"methods: unknown {method!r}; known: {' '.join(TUNED)}")
    if config.methods[0] != DESCENT:
        raise ConfigError(
            f"methods: {config.methods[0]} is first; the others are compared with {DESCENT}, put it"
            " there"
        )


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    check(config)
    begun = time.perf_counter()
    work = {"lm": language, "cnn": images}[config.task](config)
    for label in (*config.precision, config.eval_precision):
        model = work.make(label)
        for method in config.methods:
            wrapped = wrap(optimizer_of(method, chosen(config)), model.precision)
            jax.eval_shape(lambda key, m=model, w=wrapped: w.init(m.init(key)), jax.random.key(0))
    launch.writable(config.out)
    arms: list[finetune_report.Arm] = []
    rows: list[tuple[str, ...]] = []
    scores = ("loss", "accuracy") if config.task == "cnn" else ("loss",)
    for label in config.precision:
        lr, descent = None, None
        for method in config.methods:
            own = tuned(method, label, config, work, lr)
            arm = run(method, label, own, work)
            if method == DESCENT:
                lr, descent = own.lr[0], arm
            assert descent is not None
            arms.append(arm)
            rows.append(row(method, arm, descent, own, scores))
    head = (
        "arm", "tuned", "gradient steps", "proposals",
        *(column for name in scores for column in (name, "gap")), "accepted", "tokens/s", "skipped",
    )  # fmt: skip
    notes = [
        f"Equal operations: {config.steps} gradient steps of {config.batch}, or as many steps as"
        " cost that where a forward pass is a third of one. A gap is to descent in the same"
        f" precision, ± the 95 % interval over {config.seeds} paired seeds; held-out loss in"
        f" {work.unit}, judged in {config.eval_precision}.",
        f"Each arm's number was tuned from as many values by the held-out loss of one seed more;"
        f" {config.temperature:g} is the first temperature. Took {time.perf_counter() - begun:.0f}"
        f" s on {launch.machine()}.",
    ]
    title = f"{config.task}: annealing and descent at equal operations"
    finetune_report.write(config.out, [(title, head, rows)], {}, arms, notes, work.unit)


def row(
    method: str, arm: finetune_report.Arm, descent: finetune_report.Arm, config: Config,
    scores: Sequence[str],
) -> tuple[str, ...]:  # fmt: skip
    """The cells of an arm."""
    cells = [arm.label, f"{TUNED[method]} {getattr(config, TUNED[method])[0]:g}"]
    cells += [str(count) for count in extent(method, config)]
    for name in scores:
        mean, half = interval(arm.score(name))
        cells.append(f"{mean:.4f}" + ("" if np.isnan(half) else f" ± {half:.4f}"))
        pairs = zip(arm.score(name), descent.score(name), strict=True)
        mean, half = interval([a - b for a, b in pairs])
        gap = f"{mean:+.4f}" + ("" if np.isnan(half) else f" ± {half:.4f}")
        cells.append("–" if arm is descent else gap)
    rates = [seed[-1].get("acceptance", np.nan) for seed in arm.outcome.records]
    cells.append(f"{100 * np.mean(rates):.0f} %" if np.isfinite(rates[0]) else "–")
    return (*cells, f"{arm.outcome.tokens_per_s:,.0f}", " ".join(map(str, arm.outcome.skipped)))


if __name__ == "__main__":
    launch.command(main, Config)
