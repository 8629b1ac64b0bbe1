"""Does a convolutional network train in 16 or 8 bits? One ResNet on images, paired seeds.

Two modes for each 16-bit format: X32 * K16 -> Y32, where only the operands of convolutions are
rounded (a rule on `**/conv*` over fp32), and X16 * K16 -> Y16, where all that lies between is 16
bits too (the presets bf16 and fp16). The table says which dtypes the convolutions of the traced
program have. 8-bit recipes are emulated: exact in their numbers, not in their speed.

Run:       python experiments/image_cnn.py
           python experiments/image_cnn.py --data fashion-mnist --model small --steps 2800 \
               --seeds 1 --precision fp32 bf16-x32 bf16-x16
Expected:  at least .98 of the held-out digits, .90 of Fashion-MNIST's test images, in every arm;
           docs/evidence/image_cnn.md has the figures.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from common import (
    finished,
    launch,  # sets XLA flags before JAX starts
)

import jax  # isort: skip
import numpy as np
import optax
from rich.console import Console

from common.datasets.sources import IMAGES
from common.stablehlo import convolutions
from common.tables import terminal, write_page
from mpjax.data import Images, image_batches, load_images
from mpjax.data.augment import ColourJitter, RandomCrop, RandomFlip, RandomRotation
from mpjax.errors import ConfigError
from mpjax.files import write_text
from mpjax.formats.checks import did_you_mean
from mpjax.markdown import table
from mpjax.models import ResNet, resnet
from mpjax.optim import make_optimizer, wrap
from mpjax.precision import get_precision
from mpjax.report import Outcome, gap, interval, plot_loss, save_plot
from mpjax.train import build, bytes_per_parameter, fit, manifest
from mpjax.typing import Array, Batch, ModelState, Params, Settings

BARS = {"digits": 0.98, "fashion-mnist": 0.90}
ARMS = {
    "fp32": "fp32",
    "bf16-x32": "fp32 rule:**/conv*=p=f32,c=bf16,o=f32",
    "bf16-x16": "bf16",
    "fp16-x32": "fp32 rule:**/conv*=p=f32,c=f16,o=f32 loss_scale=dynamic",
    "fp16-x16": "fp16",
    "fp8": "fp8",
    "mxfp8": "mxfp8",
}
TRANSFORMS: dict[str, Callable[[int], Any]] = {  # of the height of an image
    "crop": lambda height: RandomCrop(max(1, height // 8)),
    "flip": lambda height: RandomFlip(),
    "rotation": lambda height: RandomRotation(),
    "colour": lambda height: ColourJitter(),
}
HEAD = (
    "arm", "convolutions", "accuracy", "points to reference", "loss to reference", "images/s",
    "bytes/param", "skipped",
)  # fmt: skip
stderr = Console(stderr=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """Compare precisions on one residual network."""

    data: str = "digits"
    """`digits` (scikit-learn's), `fashion-mnist`, or FILE.npz with `images` and `labels`."""
    held_out: float = 0.2
    """Share of the images that judges; Fashion-MNIST has its own."""
    precision: tuple[str, ...] = tuple(ARMS)
    """Arms by name, or presets, policies and lines of text; the first is the reference."""
    model: str = "tiny"
    """Model size by name: `tiny`, `small` or `cifar20`."""
    augment: tuple[str, ...] = ()
    """Random changes of each training image in this order: `crop`, `flip`, `rotation`, `colour`."""
    batch: int = 64
    """Images a step."""
    steps: int = 400
    """Steps a run."""
    optimizer: str = "adamw"
    """`adamw`, `sgd`, `lion` or `adafactor`."""
    lr: float = 5e-3
    """Peak learning rate."""
    schedule: str = "linear"
    """`constant`, `linear`, `cosine` or `wsd`."""
    WARMUP: ClassVar[int] = 20
    warmup: launch.Warmup = None
    """Steps of linear warm-up; by default 20, or half of the steps if these are fewer."""
    weight_decay: float = 0.01
    """Decoupled, on kernels."""
    seeds: int = 3
    """Seeds an arm; the n-th has the same initial weights and batches in every arm."""
    fresh: bool = False
    """Train again the runs that --out holds; without it those that have ended are taken as they
    are, so that an interrupted comparison goes on."""
    out: Path = Path("runs/image_cnn")
    """Folder of the report and of all runs."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one precision came to.

    Args:
      outcome: as in the comparisons of language models; its speed counts images.
      accuracy: share of the held-out images that are named right, one a seed, in the precision of
        the arm.
      convolutions: their dtypes in the traced step.
    """

    outcome: Outcome
    accuracy: tuple[float, ...]
    convolutions: str


def make(config: Config, images: Images, text: str) -> ResNet:
    """Returns the network of an arm."""
    channels = images.train["inputs"].shape[-1]
    precision = get_precision(ARMS.get(text, text))
    return resnet(config.model, precision, inputs=channels, classes=images.classes)


def training(config: Config, images: Images, seed: int) -> Iterator[Batch]:
    """Returns the batches of a seed, the same in every arm."""
    height = images.train["inputs"].shape[1]
    for name in config.augment:
        if name not in TRANSFORMS:
            hint = did_you_mean(name, TRANSFORMS)
            raise ConfigError(f"augment: unknown {name!r}; {hint}known: {' '.join(TRANSFORMS)}")
    transforms = [TRANSFORMS[name](height) for name in config.augment]
    return image_batches(images.train, batch=config.batch, seed=seed, transforms=transforms)


def optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the raw optimizer."""
    return make_optimizer(
        config.optimizer, config.lr, schedule=config.schedule, steps=config.steps,
        warmup=launch.warmup(config), weight_decay=config.weight_decay,
    )  # fmt: skip


def evaluate(
    model: ResNet, images: Images, size: int = 500
) -> Callable[[Params, ModelState], tuple[float, float]]:
    """Returns a function from weights and state to loss and accuracy on the held-out images."""

    @jax.jit
    def sums(params: Params, state: ModelState, part: Batch) -> tuple[Array, Array]:
        logits, _ = model.apply(params, part["inputs"], state=state)
        loss, _ = model.loss(params, part, state=state)
        return loss * len(part["targets"]), (logits.argmax(-1) == part["targets"]).sum()

    data = images.held_out
    count = len(data["targets"])
    parts = [
        {name: array[first : first + size] for name, array in data.items()}
        for first in range(0, count, size)
    ]

    def judge(params: Params, state: ModelState) -> tuple[float, float]:
        found = [jax.device_get(sums(params, state, part)) for part in parts]
        loss, right = np.sum([[float(a), float(b)] for a, b in found], axis=0)
        return loss / count, right / count

    return judge


CHOOSING = ("seeds", "precision")  # settings that change no run


def page_of(config: Config, model: ResNet, text: str, seed: int) -> tuple[Path, Settings]:
    """Returns the folder of a run and its manifest."""
    folder = config.out / text.replace(" ", "_").replace("/", "-") / f"seed{seed}"
    how = {recipe.name: {"convolution": "emulated"} for recipe in model.recipes.values()}
    return folder, manifest(model.precision, launch.settings(config, seed=seed), model.paths, how)


def run_arm(config: Config, images: Images, text: str) -> Arm:
    """Trains one arm under each seed; the step is compiled once."""
    model = make(config, images, text)
    first = next(training(config, images, 0))
    state, step = build(model, optimizer(config))
    assert step.init is not None
    dtypes = convolutions(step.compiled.lower(state, first))
    judge, pixels = evaluate(model, images), first["inputs"][0].size
    exact = evaluate(dataclasses.replace(model, precision=get_precision("fp32")), images)
    losses, accuracy, records = [], [], []
    for seed in range(config.seeds):
        folder, page = page_of(config, model, text, seed)
        if ended := finished.begin(folder, page, CHOOSING, stderr):
            outcome, history = ended
        else:
            with finished.recording(
                folder, page, model.precision.to_text(), f"{text}, seed {seed}", config.steps,
                stderr, lambda record: record | {"images_per_s": record["tokens_per_s"] / pixels},
            ) as (writer, report, history):  # fmt: skip
                data = training(config, images, seed)
                state = fit(step.init(seed), step, data, steps=config.steps, report=report)
            outcome = {
                "validation_loss": exact(state.params, None)[0],
                "accuracy": judge(state.params, state.model_state)[1],
                "bytes_per_parameter": bytes_per_parameter(state),
            }
            writer.write({"step": config.steps} | outcome)
            writer.close()
            finished.end(folder, outcome)
        losses.append(outcome["validation_loss"])
        accuracy.append(outcome["accuracy"])
        records.append(history)
    arm = finished.outcome_of(
        text, config.precision[0], losses, records, outcome["bytes_per_parameter"], "images_per_s"
    )
    return Arm(arm, tuple(accuracy), "; ".join(dtypes))


def measured(form: str, mean: float, half: float) -> str:
    """A mean and, where there are several seeds, the half-width of its interval."""
    text = form.format(mean)
    return text if np.isnan(half) else f"{text} ± {form.replace('+', '').format(half)}"


def rows(arms: Sequence[Arm]) -> list[tuple[str, ...]]:
    """Returns the cells of the table, one row an arm."""
    reference = arms[0]
    found: list[tuple[str, ...]] = []
    for arm in arms:
        o, own = arm.outcome, arm is reference
        points = [100 * (a - b) for a, b in zip(arm.accuracy, reference.accuracy, strict=True)]
        found.append((
            o.label, arm.convolutions, measured("{:.4f}", *interval(arm.accuracy)),
            "–" if own else measured("{:+.2f}", *interval(points)),
            "–" if own else measured("{:+.1f}", *gap(o, reference.outcome)) + " %",
            f"{o.tokens_per_s:,.0f}", f"{o.bytes_per_parameter:.2f}", " ".join(map(str, o.skipped)),
        ))  # fmt: skip
    return found


def compare(config: Config) -> list[Arm]:
    """Trains all arms and writes the report."""
    start = time.perf_counter()
    images = load_images(config.data, held_out=config.held_out, sources=IMAGES)
    training(config, images, 0)
    raw = optimizer(config)
    for text in config.precision:  # the last arm's mistake, before the first has run
        model = make(config, images, text)
        wrapped = wrap(raw, model.precision)
        jax.eval_shape(lambda key, m=model, w=wrapped: w.init(m.init(key)), jax.random.key(0))
        for seed in range(config.seeds):
            finished.check(*page_of(config, model, text, seed), CHOOSING)
    launch.writable(config.out)
    arms = [run_arm(config, images, text) for text in config.precision]
    title = f"One ResNet on {Path(config.data).name}, several precisions"
    launch.wide().print(terminal(title, HEAD, rows(arms), "left"))
    shape = images.train["inputs"].shape
    notes = [
        "Accuracy in the precision of the arm, loss in float32, both on"
        f" {len(images.held_out['targets'])} held-out images; ± is the 95 % interval over seeds;"
        " differences are paired: same initial weights, same batches. Dtypes of convolutions are"
        " those of the traced step (StableHLO), forward and backward.",
        f"{config.seeds} seeds, {config.steps} steps of {config.batch} of {shape[0]} images"
        f" {shape[1]} x {shape[2]} x {shape[3]}, model {config.model}, lr {config.lr:g}"
        f"{', changed by ' + ' '.join(config.augment) if config.augment else ''}."
        f" Took {time.perf_counter() - start:.0f} s on {launch.machine()}.",
    ]
    if config.data in BARS:
        low = [arm.outcome.label for arm in arms if np.mean(arm.accuracy) < BARS[config.data]]
        bar = f"Bar of {BARS[config.data]:.2f}:"
        notes.insert(0, f"{bar} missed by {', '.join(low)}." if low else f"{bar} met by all arms.")
    launch.wide().print("\n".join(notes))
    outcomes, unit = [arm.outcome for arm in arms], "nats/image"
    save_plot(plot_loss(outcomes, unit=unit), config.out / "loss.png")
    write_page(config.out, outcomes, [(title, HEAD, rows(arms))], notes, unit)
    text = "\n\n".join([f"# {title}", table(HEAD, rows(arms)), *notes])
    write_text(config.out / "report.md", text + "\n\n![loss](loss.png)\n")
    launch.wide().print(f"report: {config.out / 'report.md'}")
    return arms


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    launch.positive(config, "batch", "steps", "lr", "seeds")
    launch.not_empty(config, "precision")
    launch.distinct(config, "precision")
    compare(config)


if __name__ == "__main__":
    launch.command(main, Config)
