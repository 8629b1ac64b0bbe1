"""The plan files of `stages.py`: TOML to settings, every key and value checked.

A file has settings of all stages, a table `[model]` and a `[[stage]]` for each stage. The keys of a
stage are the fields of its kind's class here; `from` is `source`.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from common import launch  # sets XLA flags before JAX starts
from mpjax.errors import ConfigError, brief
from mpjax.formats.checks import did_you_mean
from mpjax.train.stages import TAKES
from mpjax.typing import Json, Settings


@dataclasses.dataclass(frozen=True)
class Named:
    """What every stage has."""

    name: str
    kind: str
    source: str = ""  # key `from`: the earlier stage that it goes on from; that before it

    required: ClassVar[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True)
class Trained(Named):
    """A stage that trains."""

    take: str = ""  # nothing, weights or weights+moments of `from`; weights but in the first stage
    precision: str = "fp32"  # or a schedule, such as late:fp8:bf16:0.2
    optimizer: str = "adamw"
    lr: float = 1e-3  # peak
    schedule: str = "linear"  # with moments it goes on: over the steps of both stages
    WARMUP: ClassVar[int] = 20
    warmup: int | None = None  # 20, or half of the steps if these are fewer; 0 with moments
    weight_decay: float = 0.01
    clip: float = 1.0
    steps: int = 0
    batch: int = 32
    accumulate: int = 1
    model: dict[str, Any] = dataclasses.field(default_factory=dict)  # differs from the source's

    required: ClassVar[tuple[str, ...]] = ("steps",)


@dataclasses.dataclass(frozen=True)
class OnText(Trained):
    """A stage with data of its own."""

    data: str = ""
    tokenizer: str = ""  # only where no weights are taken; without it that of `from`

    required: ClassVar[tuple[str, ...]] = ("data", "steps")


@dataclasses.dataclass(frozen=True)
class Masked(OnText):
    """BERT's pre-training: masked tokens and next sentences, of documents."""

    lengths: tuple[int, ...] = (64,)
    lines: int = 100
    documents: int = 500
    mask_rate: float = 0.15
    masked_weight: float = 1.0
    next_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Classify(OnText):
    """A class for each text."""

    lengths: tuple[int, ...] = (32, 64, 128)


@dataclasses.dataclass(frozen=True)
class NextToken(OnText):
    """Language modelling, of documents."""

    seq: int = 128
    held_out: float = 0.05


@dataclasses.dataclass(frozen=True)
class Instruct(OnText):
    """Answers to prompts, of pairs; the loss is of the answers alone."""

    lengths: tuple[int, ...] = (64, 128)
    pack: bool = False  # several pairs in a row of the longest length, each read alone
    prompt: str = "Question: {}\nAnswer: "


@dataclasses.dataclass(frozen=True)
class Distil(Trained):
    """The task of a teacher's stage, whose answers are soft targets."""

    teacher: str = ""
    teacher_precision: str = ""  # that of the evaluation
    temperature: float = 2.0
    soft: float = 1.0
    hard: float = 1.0
    divergence: str = "forward"

    required: ClassVar[tuple[str, ...]] = ("teacher", "steps")


@dataclasses.dataclass(frozen=True)
class Prune(Trained):
    """The smallest weights become zero: at once, or with `steps` while the task goes on."""

    sparsity: float = 0.0
    scope: str = "global"

    required: ClassVar[tuple[str, ...]] = ("sparsity",)


@dataclasses.dataclass(frozen=True)
class Layers(Named):
    """Some layers alone, such as the first weights of a smaller student."""

    layers: tuple[int, ...] = ()

    required: ClassVar[tuple[str, ...]] = ("layers",)


@dataclasses.dataclass(frozen=True)
class Quantise(Named):
    """Weights in fewer bits, for inference."""

    storage: str = "int8"
    rules: tuple[str, ...] = ()


KINDS: dict[str, type[Named]] = {
    "masked": Masked, "classify": Classify, "language": NextToken, "instruct": Instruct,
    "distil": Distil, "prune": Prune, "layers": Layers, "quantise": Quantise,
}  # fmt: skip
FAMILIES = ("encoder", "decoder")
_KEYS = {"source": "from"}  # field -> key where they differ


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan file.

    Args:
      stages: in their order, `source` and `take` filled in.
      model: `family`, `size` and fields of the model's config.
      seed: of weights, data and dropout.
      eval_precision: in which all stages are judged.
      eval_batches: batches of held-out data that judge a stage, evenly spread; texts with classes
        are all judged.
      mesh: devices by axis, such as `data=2`; one device without.
    """

    stages: tuple[Named, ...]
    model: dict[str, Any]
    seed: int = 0
    eval_precision: str = "fp32"
    eval_batches: int = 16
    mesh: str = ""

    @property
    def family(self) -> str:
        """Which family of models it trains."""
        return self.model["family"]


def read_plan(path: Path) -> Plan:
    """Reads a plan file.

    Raises:
      ConfigError: it is not there or no TOML, a key is unknown, missing or of another type, or a
        stage goes on from one that is not before it.
    """
    try:
        content = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise ConfigError(
            f"plan: {path} cannot be read ({error.strerror}); name a .toml, such as"
            " experiments/plans/bert.toml"
        ) from None
    except ValueError as error:  # no TOML, or no UTF-8
        raise ConfigError(f"plan: {path} is no TOML ({error}); mend the file") from None
    where = f"plan {path}"
    for name in ("model", "stage"):
        if name not in content:
            table = "[model] with family and size" if name == "model" else "a [[stage]] for each"
            near = did_you_mean(name, content)
            raise ConfigError(f"{where}: has no {name}; {near}write {table}")
    tables, model = content.pop("stage"), content["model"]
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise ConfigError(f"{where}: stage is {brief(tables)}; write [[stage]] above each stage")
    settings = _checked(content, Plan, where, hidden=("stages",))
    if (family := model.get("family")) not in FAMILIES:
        near = did_you_mean(str(family), FAMILIES)
        raise ConfigError(
            f"{where}: model: unknown family {family!r}; {near}known: {' '.join(FAMILIES)}"
        )
    if own := sorted(model.keys() & {"head", "classes", "labels", "vocabulary"}):
        raise ConfigError(f"{where}: model: {own[0]} is what its stages' data say; leave it out")
    if not isinstance(model.get("size"), str):
        raise ConfigError(f"{where}: model: no size; give one, such as bert-tiny or tiny")
    stages: list[Named] = []
    for number, one in enumerate(tables, 1):
        stages.append(_stage(one, stages, f"{where}: stage {one.get('name', number)!r}"))
    plan = Plan(tuple(stages), **settings)
    launch.not_negative(plan, "seed")
    launch.positive(plan, "eval_batches")
    return plan


def _stage(table: Mapping[str, Json], before: list[Named], where: str) -> Named:
    """The settings of one `[[stage]]`."""
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        near = did_you_mean(str(kind), KINDS)
        raise ConfigError(f"{where}: unknown kind {brief(kind)}; {near}known: {' '.join(KINDS)}")
    found = _checked(table, KINDS[kind], where, f" of {kind}")
    stage = KINDS[kind](**found)
    names = [one.name for one in before]
    if stage.name in names:
        raise ConfigError(f"{where}: stands twice; give each stage a name of its own")
    wanted = {"from": stage.source, "teacher": getattr(stage, "teacher", "")}
    for key, name in wanted.items():
        if name and name not in names:
            near = did_you_mean(name, names)
            raise ConfigError(
                f"{where}: {key} = {name!r}, which no stage before it makes; {near}before it:"
                f" {' '.join(names) or 'none'}"
            )
    source = stage.source or (names[-1] if names else "")
    if not isinstance(stage, Trained):
        if not source:
            raise ConfigError(f"{where}: {kind} needs weights, and no stage is before it")
        return dataclasses.replace(stage, source=source)
    return _trained(stage, source, found, where)


def _trained(stage: Trained, source: str, found: Settings, where: str) -> Trained:
    """Fills in what a training goes on from, and checks its numbers."""
    take = stage.take or ("weights" if source else "nothing")
    if take not in TAKES:
        near = did_you_mean(take, TAKES)
        raise ConfigError(f"{where}: unknown take {take!r}; {near}known: {' '.join(TAKES)}")
    if not source and (take != "nothing" or isinstance(stage, Prune)):
        what = f"take = {take!r}" if take != "nothing" else stage.kind
        raise ConfigError(f"{where}: {what} needs an earlier stage, and none is before it")
    if isinstance(stage, Prune) and not stage.steps:
        unread = sorted(found.keys() - {"name", "kind", "source", "sparsity", "scope"})
        if unread:
            raise ConfigError(
                f"{where}: pruning at once does not read {_KEYS.get(unread[0], unread[0])}; leave"
                " it out, or give steps"
            )
        return dataclasses.replace(stage, source=source)
    own = getattr(stage, "tokenizer", "")
    if own and take != "nothing":
        raise ConfigError(
            f"{where}: tokenizer = {own!r} and take = {take!r} of {source!r}, whose weights know"
            " its own tokenizer; leave tokenizer out, or take nothing"
        )
    if not own and not source and isinstance(stage, OnText):
        raise ConfigError(
            f"{where}: no tokenizer; give wordpiece:1000 to an encoder, bytes or bpe:1000 to a"
            " decoder, or a tokenizer.json"
        )
    warmup = stage.warmup
    if warmup is None:
        warmup = 0 if take == "weights+moments" else launch.warmup(stage)
    stage = dataclasses.replace(stage, source=source, take=take, warmup=warmup)
    numbers = ("steps", "batch", "accumulate", "lr", "clip", "lengths", "seq", "lines", "documents")
    try:
        launch.positive(stage, *(name for name in numbers if hasattr(stage, name)))
        launch.not_negative(stage, "warmup", "weight_decay")
        if hasattr(stage, "lengths"):
            launch.not_empty(stage, "lengths")
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if isinstance(stage, Instruct) and stage.prompt.count("{}") != 1:
        raise ConfigError(f"{where}: prompt = {stage.prompt!r}; write {{}} once, for the question")
    return stage


def _checked(
    table: Mapping[str, Json], kind: type, where: str, of: str = "", hidden: tuple[str, ...] = ()
) -> Settings:
    """A TOML table as arguments of a dataclass."""
    types = typing.get_type_hints(kind)
    fields = {
        _KEYS.get(f.name, f.name): f for f in dataclasses.fields(kind) if f.name not in hidden
    }
    found: Settings = {}
    for key, value in table.items():
        if key not in fields:
            near = did_you_mean(key, fields)
            raise ConfigError(f"{where}: unknown key {key!r}; {near}keys{of}: {' '.join(fields)}")
        name = fields[key].name
        found[name] = _value(value, types[name], f"{where}: {key}")
    required = [f.name for f in fields.values() if _needed(f)] + [*getattr(kind, "required", ())]
    for name in required:
        if found.get(name) in (None, "", ()):
            raise ConfigError(f"{where}: no {name}; give one")
    return found


def _needed(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def _value(value: Json, kind: Any, where: str) -> Any:
    """A value of TOML as a field has it."""
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if not isinstance(value, list):
            raise ConfigError(f"{where} is {brief(value)}; write a list, such as [64]")
        return tuple(_value(one, inner, where) for one in value)
    if typing.get_origin(kind) is dict:
        kind = dict
    if kind == int | None:  # which a file cannot say
        kind = int
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        words = {
            int: "a whole number", float: "a number", str: "a text", dict: "a table",
            bool: "true or false",
        }  # fmt: skip
        raise ConfigError(f"{where} is {brief(value)}; write {words[kind]}")
    return value
