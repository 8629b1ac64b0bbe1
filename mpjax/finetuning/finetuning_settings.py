"""What is fine-tuned, and how: every setting with its default."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

from mpjax.errors import ConfigError, brief, is_whole
from mpjax.formats.checks import did_you_mean
from mpjax.typing import Settings

TASKS = ("classify", "pair", "regress", "tag", "seq2seq", "lm", "instruct")
NEW = "new"


@dataclasses.dataclass(frozen=True)
class Finetuning:
    """Fine-tune a model on data of your own, and keep the best of it."""

    task: Literal["classify", "pair", "regress", "tag", "seq2seq", "lm", "instruct"] = "classify"
    """A class for each text, or for each `pair` of texts; a number for each text or pair
    (`regress`); a `tag` for each word; a sequence for each sequence (`seq2seq`); the next token
    (`lm`); an answer to each prompt (`instruct`)."""
    model: str = NEW
    """A folder or a name on the Hugging Face Hub; `new` begins with new weights of --layers,
    --width and --heads, and a tokenizer of the data's."""
    text: str = ""
    """Column of the texts, `text` by default; of `instruct` the prompts, `prompt` by default unless
    there are `messages` or `conversations`, and of `seq2seq` `source`."""
    label: str = ""
    """Column of the classes or numbers, `label` by default; of `instruct` the answers, `answer` or
    `completion` by default, and of `seq2seq` `target`."""
    second: str = ""
    """Column of the second text of a pair; `pair` has `second` by default."""
    validation: str = ""
    """Data that judges; by default --held-out of the data."""
    held_out: float = 0.1
    """Share of the data that judges, the same of each class; equal texts stay together."""
    missing: Literal["error", "drop", "empty"] = "error"
    """Of rows with an empty cell: stop, leave them out, or take the cell as an empty text."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Of rows that repeat an earlier one: keep them, or leave them out."""
    class_weights: bool = False
    """Weigh each class alike, however many examples it has."""
    balanced: bool = False
    """Draw each class as often, however many examples it has: batches hold as many of each."""
    prompt: str = ""
    """Of `instruct`: what stands around a prompt, which is {}; by default the chat template of the
    model, or an end of line behind the prompt where it has none."""
    precision: str = "bf16"
    """A preset, policy or line of text, or a schedule such as late:fp8:bf16:0.2."""
    eval_precision: str = "fp32"
    """Precision that judges."""
    layers: int = 2
    """Blocks of a new model."""
    width: int = 64
    """Width of a new model."""
    heads: int = 4
    """Attention heads of a new model."""
    vocabulary: int = 2000
    """Ids of a new tokenizer."""
    dropout: float = 0.1
    """Rate in training, of encoders."""
    longest: int = 128
    """Tokens of a text at most; longer ones are cut, and counted."""
    batch: int = 16
    """Texts a step."""
    accumulate: int = 1
    """Microbatches a step."""
    mesh: str = ""
    """Devices, such as data=2,fsdp=4; one device by default."""
    epochs: float = 3.0
    """Times that every example is seen; --steps goes before it."""
    steps: int = 0
    """Steps; 0 takes those of the epochs."""
    optimizer: str = "adamw"
    """`adamw`, `sgd`, `lion` or `adafactor`."""
    lr: float = 0.0
    """Peak learning rate; 0 takes 5e-5, of a new model 1e-3."""
    schedule: str = "linear"
    """`constant`, `linear`, `cosine` or `wsd`."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.01
    """Decoupled, on matrices."""
    clip: float = 1.0
    """Largest global gradient norm; 0 clips nothing."""
    evaluate_every: int = 0
    """Steps between judgements on held-out data; 0 judges once an epoch. Each is a checkpoint."""
    metric: str = ""
    """Score whose best weights are kept; by default accuracy of classes and tags, else the loss."""
    patience: int = 0
    """Judgements in a row without a better one after which the run ends; 0 never ends it early."""
    seed: int = 0
    """Of new weights, of the order of the data and of dropout."""
    out: Path = Path("runs/finetune")
    """Folder of the run: report, metrics, checkpoints and the best weights."""
    export: str = ""
    """New folder in which the best weights are written at the end, for transformers to load."""
    wandb: str = ""
    """Project in Weights & Biases, which gets the records too; the extra `wandb`."""
    resume: bool = False
    """Go on with the run in --out: the same bits as if it had not been stopped."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out).expanduser())
        for name, known in (
            ("task", TASKS), ("missing", ("error", "drop", "empty")),
            ("duplicates", ("keep", "drop")),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in known:
                hint = did_you_mean(str(value), known)
                raise ConfigError(f"{name}: unknown {brief(value)}; {hint}known: {' '.join(known)}")
        whole = {
            "layers": 1, "width": 1, "heads": 1, "vocabulary": 1, "longest": 4, "batch": 1,
            "accumulate": 1, "steps": 0, "evaluate_every": 0, "patience": 0, "seed": 0,
        }  # fmt: skip
        for name, least in whole.items():
            value = getattr(self, name)
            if not is_whole(value, least):
                raise ConfigError(f"{name}={brief(value)}: expected a whole number from {least} on")
            object.__setattr__(self, name, int(value))  # NumPy's cannot be written as JSON
            if value >= 2**31:
                raise ConfigError(f"{name}={value}: does not fit int32; give at most {2**31 - 1}")
        for name in ("class_weights", "balanced", "resume"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={brief(getattr(self, name))}: expected True or False")
        for name in ("held_out", "dropout", "epochs", "lr", "warmup", "weight_decay", "clip"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            most = 1.0 if name in ("held_out", "dropout", "warmup") else math.inf
            if not (number and math.isfinite(value) and 0 <= value <= most):
                upto = f" up to {most:g}" if most == 1 else ""
                raise ConfigError(f"{name}={brief(value)}: expected a number from 0 on{upto}")
        if not self.steps and not self.epochs:
            raise ConfigError("steps=0 and epochs=0: nothing to train; give one of them")
        if not self.validation and not 0 < self.held_out < 1:
            raise ConfigError(
                f"held_out={self.held_out:g}: nothing would judge the run; give a share above 0"
                " and below 1, or validation=FILE"
            )
        if self.task == "seq2seq" and not self.new:
            raise ConfigError(
                f"model={self.model!r}: seq2seq trains a new model; leave it out, or take another"
                " task"
            )
        if not isinstance(self.export, str | Path):
            raise ConfigError(f"export={brief(self.export)}: expected a folder")
        if self.prompt and self.task != "instruct":
            raise ConfigError(f"prompt={self.prompt!r}: {self.task} has none; leave it out")
        if self.prompt and self.prompt.count("{}") != 1:
            raise ConfigError(
                f"prompt={self.prompt!r}: expected {{}} once, where the prompt stands"
            )
        for name, tasks in (
            ("label", ("classify", "pair", "regress", "instruct", "seq2seq")),
            ("second", ("pair", "regress")), ("class_weights", ("classify", "pair")),
            ("balanced", ("classify", "pair")),
        ):  # fmt: skip
            if getattr(self, name) and self.task not in tasks:
                raise ConfigError(
                    f"{name}={brief(getattr(self, name))}: {self.task} has none; leave it out"
                )

        if self.balanced and self.class_weights:
            raise ConfigError(
                "balanced and class_weights: rare classes would count twice; leave one out"
            )

    @property
    def new(self) -> bool:
        """Whether the model begins with new weights."""
        return self.model == NEW

    def to_dict(self) -> Settings:
        """Returns all settings that decide a result, as JSON."""
        held = dataclasses.asdict(self)
        for name in ("out", "export", "resume", "wandb"):
            del held[name]
        return held

    @property
    def flat(self) -> dict[str, str]:
        """What `to_dict` returns, as texts."""
        return {name: str(value) for name, value in self.to_dict().items()}

    @classmethod
    def of(cls, settings: Settings) -> Finetuning:
        """Returns settings by name.

        Raises:
          ConfigError: an unknown name, or a value out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(f"finetune: no setting {name!r}; {hint}known: {' '.join(known)}")
        found: Any = settings
        return cls(**found)
