"""The settings of `train_lm.py`: its command line, and which of them a resumed run may change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from common import launch
from common.command_line import imported
from common.lm import Shape, shape_changes
from mpjax.errors import ConfigError
from mpjax.precision import Precision, PrecisionSchedule, get_precision, get_schedule
from mpjax.precision.precision import OPTIONS
from mpjax.typing import Settings

# What a resumed run may change: how long, how it is watched, and on which devices.
MAY_CHANGE = (
    "steps", "out", "resume", "mesh", "eval_every", "eval_batches", "save_every", "keep",
    "keep_best", "monitor_every", "monitor_sample", "audit", "wandb", "prompt", "sample",
    "distributed", "init_from", "recast",
)  # fmt: skip

OfPreset = Annotated[
    str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="(default: the preset's)")
]

DEFAULT, JUDGE = "bf16", "fp32"  # the precisions of training and validation if none is given
PRECISION = ("precision", "precision_schedule", "rule", *OPTIONS)


@dataclasses.dataclass(frozen=True)
class Config:
    """Train a decoder language model under a Precision."""

    precision: Annotated[
        str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="(default: bf16)")
    ] = None
    """Preset (fp32 bf16 fp16 O2 ...), policy (p=f32,c=bf16,o=f32) or `Precision.to_text`."""
    precision_schedule: str = ""
    """In place of --precision: late:fp8:bf16:0.1, dynamic:fp16:fp32, mixed:fp8:norm=fp32, fixed."""
    rule: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """PATTERN=POLICY before the preset's rules, such as '**/norm*=fp32'; repeatable."""
    loss_scale: OfPreset = None
    """`none`, `static:1024`, `dynamic:init=65536,interval=2000,hysteresis=1,min=1`,
    `logmax:format=float16,c=4` or `leaf:groups=PATTERN|PATTERN`."""
    update: OfPreset = None
    """Update of weights that are stored low: none, master, nearest, stochastic, kahan."""
    moments: OfPreset = None
    """Storage of Adam's moments: bf16, int8@256, int4@128, fp8, first=bf16, int8,keep=**/embed."""
    gradient_dtype: OfPreset = None
    """Dtype in which weight gradients are summed over devices."""
    residuals: OfPreset = None
    compression: OfPreset = None
    """Of gradients between replicas of the axis data: int8@256, sign, topk:0.01, powersgd:4."""
    eval_precision: str = JUDGE
    """Precision of validation: results are judged in float32 unless asked otherwise."""

    data: str = "stdlib"
    """`stdlib`, `janeausten`, a text file, a folder, FILE.jsonl:COLUMN, FILE.parquet:COLUMN or
    hf:NAME."""
    tokenizer: str = "bytes"
    """`bytes`, `bpe:SIZE` (trained on the data) or a tokenizer.json."""
    held_out: float = 0.05
    """Share of the documents kept for validation."""

    model: str = "tiny"
    """tiny small gpt2 gpt2-medium gpt2-large gpt2-xl llama-7b llama-13b llama3-8b."""
    shape: tyro.conf.OmitArgPrefixes[Shape] = Shape()  # type: ignore[valid-type]
    """What differs from the named model."""
    mesh: str = ""
    """Devices by axis, such as data=2,fsdp=2,tensor=2; all devices on data by default."""
    diloco: str = ""
    """Replicas of the axis data train apart and meet: every=20,lr=0.7,momentum=0.9; what they send
    of their weights is in the form of --compression. By default they exchange every gradient."""
    distributed: str = ""
    """Several processes: `auto` (SLURM, Open MPI, TPU pods) or COORDINATOR:PORT,INDEX,COUNT, with
    ,wait=SECONDS where one comes later than 20 s."""

    optimizer: str = "adamw"
    """`adamw`, `sgd`, `lion`, `adafactor` or `one-bit-adam`."""
    lr: float = 1e-3
    """Peak learning rate."""
    schedule: str = "cosine"
    """`constant`, `linear`, `cosine` or `wsd`."""
    WARMUP: ClassVar[int] = 20
    warmup: launch.Warmup = None
    """Steps of linear warm-up; by default 20, or half of the steps if these are fewer."""
    weight_decay: float = 0.1
    """Decoupled, on matrices only."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    patience: int = 50
    """Non-finite steps in a row at the smallest loss scale after which the run stops."""

    steps: int = 200
    """Steps of the whole run, those before a resume included."""
    batch: int = 16
    """Sequences a step, over all devices."""
    seq: int = 128
    """Tokens a sequence."""
    pack: bool = False
    """Rows of whole documents, cut where they are longer, with attention inside each alone;
    otherwise windows of the text, borders included. Validation is of windows either way."""
    accumulate: int = 1
    """Microbatches a step; their gradients are summed in float32."""
    seed: int = 0
    """Of weights, batches and dropout."""

    eval_every: int = 100
    """Steps between validations; 0 only at the end."""
    eval_batches: int = 16
    """Batches of a validation, evenly spread over the held-out text."""
    save_every: int = 100
    """Steps between checkpoints; 0 only at the end."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_best: int = 0
    """Best checkpoints by validation loss to keep besides."""
    monitor_every: int = 0
    """Steps between measurements of all tensors (monitor.jsonl, monitor.png); 0 for none."""
    monitor_sample: int = 4096
    """Numbers of each tensor that are measured, beside its extremes; 0 measures all."""
    audit: bool = False
    """Write audit.json: which dtype each product of the step runs in, and where it leaks."""
    resume: str = ""
    """`latest`, `latest-good` (skips damaged checkpoints) or a step."""
    recast: bool = False
    """With --resume: go on in another Precision; what was cast is printed."""
    init_from: str = ""
    """Run whose newest weights a new run starts from; what was cast is printed."""
    out: Path = Path("runs/lm")
    """Folder of the run."""
    wandb: str = ""
    """Weights & Biases project, with the wandb extra."""
    prompt: str = "def "
    """Start of the sample at the end."""
    sample: int = 200
    """Tokens of the sample; 0 for none."""

    def _options(self) -> Settings:
        return {"rules": self.rule} | {name: getattr(self, name) for name in OPTIONS}

    def named(self) -> str:
        """The precision of a run without a schedule, as it was given."""
        return DEFAULT if self.precision is None else self.precision

    def resolved(self) -> Precision:
        """The Precision that the run begins in."""
        schedule = self.resolved_schedule()
        if schedule is not None:
            return schedule.first
        return get_precision(self.named(), **self._options())

    def resolved_schedule(self) -> PrecisionSchedule | None:
        """The schedule of Precision, over the run's steps; None without one."""
        if not self.precision_schedule:
            return None
        if self.precision is not None:
            raise ConfigError(
                f"precision_schedule: {self.precision_schedule!r} and --precision {self.precision}"
                " both say what to train in; leave one of them out"
            )
        schedule = get_schedule(self.precision_schedule).over(self.steps)
        return schedule.with_options(**self._options())

    def judged_in(self) -> str:
        """The Precision of validation: `--eval-precision`, or what a fixed schedule says."""
        schedule = self.resolved_schedule()
        if schedule is None or schedule.evaluation is None:
            return self.eval_precision
        if self.eval_precision != JUDGE and schedule.evaluation.name != self.eval_precision:
            raise ConfigError(
                f"eval_precision: {self.eval_precision} and --precision-schedule"
                f" {self.precision_schedule!r}, which is judged in {schedule.evaluation.name},"
                " differ; leave one of them out"
            )
        return schedule.evaluation.to_text()


def settings(config: Config) -> Settings:
    """All settings as JSON-able values; the model's shape is written out."""
    values = dataclasses.asdict(config) | {
        "out": str(config.out), "warmup": launch.warmup(config),
    }  # fmt: skip
    if not config.precision_schedule:
        values["precision"] = config.named()
    # An unused setting is left out, so that runs from before it existed can be resumed.
    unused: Settings = {"precision_schedule": "", "pack": False, "audit": False}
    values = {k: v for k, v in values.items() if k not in unused or v != unused[k]}
    values["shape"] = shape_changes(config.shape)
    if imported():
        values["imports"] = imported()
    return json.loads(json.dumps(values))
