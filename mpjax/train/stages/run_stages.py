"""Runs the stages of a plan one after the other; the same call again goes on where one was killed.

A folder holds one run of a plan:

    plan.json               settings of all stages, versions and environment
    STAGE/checkpoints/      the last steps of a training, or the weights of an edit
    STAGE/metrics.jsonl     a record a step, and one of the scores; tensorboard/ beside it
    STAGE/done.json         the scores, written as the last thing
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.files import is_temporary, write_text
from mpjax.json_text import parse_json
from mpjax.optim.checks import check_whole
from mpjax.train.checkpoint import leaves
from mpjax.train.checkpoint.checkpointer import Checkpointer
from mpjax.train.checkpoint.lock import LOCK
from mpjax.train.checkpoint.reader import CheckpointReader
from mpjax.train.checkpoint.restore import differences
from mpjax.train.loop import fit
from mpjax.train.report.environment import environment, environment_differences
from mpjax.train.report.manifest import versions
from mpjax.train.report.metrics_writer import MetricsWriter, read_metrics, to_line
from mpjax.train.stages.outline import Outline, check_stages, made_by
from mpjax.train.stages.stage import Edit, Judge, Stage, Training
from mpjax.train.stages.take_over import TakeOver, take_over
from mpjax.train.step import TrainState
from mpjax.typing import Json, Params, Settings

PLAN, DONE, CHECKPOINTS = "plan.json", "done.json", "checkpoints"
log = logging.getLogger("mpjax.train")

Report = Callable[[str, Settings], None]  # name of a stage, record


@dataclasses.dataclass(frozen=True)
class Finished:
    """A stage that has ended.

    Args:
      name: of the stage.
      folder: of the stage.
      steps: that it trained; 0 of an edit.
      scores: what its judge said.
      taken: what it took over; None if nothing.
      params: its weights, abstract.
    """

    name: str
    folder: Path
    steps: int
    scores: dict[str, float]
    taken: TakeOver | None
    params: Params = dataclasses.field(repr=False, compare=False)

    def checkpoint(self) -> CheckpointReader:
        """Returns the checkpoints of the stage, whose newest is that at its end.

        Raises:
          ConfigError: that at the end is damaged.
        """
        reader = CheckpointReader(self.folder / CHECKPOINTS)
        if _newest_good(reader, self.name, self.folder) != self.steps:
            raise ConfigError(
                f"stage {self.name!r}: the checkpoint at its end is damaged; remove"
                f" {self.folder / DONE}, and its last steps are trained again to the same results"
            )
        return reader

    def weights(self) -> Params:
        """Reads the weights at the end, as stored, onto the first device.

        Raises:
          ConfigError: the checkpoint is damaged, or holds other weights than the plan makes.
        """
        reader = self.checkpoint()
        tree = {"params": self.params}
        wanted = leaves.named_leaves(tree)
        saved = {n: leaves.describe(x) for n, x in reader.read_leaves(self.steps).items()}
        saved = {name: text for name, text in saved.items() if name.startswith("params/")}
        leaves.require_same(f"stage {self.name!r}", saved, wanted)
        read = reader.read({n: leaves.target(x) for n, x in wanted.items()}, self.steps)
        return jax.tree.unflatten(jax.tree.structure(tree), [read[n] for n in wanted])["params"]


def run_stages(
    stages: Sequence[Stage],
    folder: str | Path,
    *,
    save_every: int = 100,
    keep: int = 2,
    report: Report = lambda name, record: None,
    stop: Callable[[], str | None] = lambda: None,
) -> dict[str, Finished]:
    """Runs a plan, or goes on with it: the same bits as if it had never been stopped.

    All stages are checked before anything is written. A stage that has ended is taken as it is;
    one that was killed goes on from its last checkpoint, with its data and its log at that step.

    Args:
      stages: in their order. A folder that holds the beginning of the plan goes on with stages that
        were added behind it.
      folder: of the run, for one process at a time.
      save_every: steps between checkpoints; each stage saves at its end, with 0 there alone.
      keep: newest checkpoints of a stage to keep.
      report: called with a stage's name and each record, as it is logged.
      stop: asked after each step, as of `fit`; a reason saves and ends the run early.

    Returns:
      Name -> what has ended, in order; fewer than `stages` if `stop` gave a reason.

    Raises:
      ConfigError: what `check_stages` raises, a folder that holds another plan's run or something
        else, another environment than that at the beginning, or several processes.
      TrainingStopped: see `fit`.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> import optax
      >>> from mpjax.data import batches
      >>> from mpjax.models import decoder
      >>> from mpjax.train import build
      >>> def train(precision):
      ...     model = decoder("tiny", precision, layers=1, width=16, heads=2)
      ...     data = batches(np.arange(99), batch=2, seq=8, seed=0)
      ...     return lambda weights: Training(*build(model, optax.sgd(0.1)), data, steps=2)
      >>> stages = [Stage("first", train("bf16")),
      ...           Stage("then", train("fp32"), take="weights", source="first")]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     ended = run_stages(stages, folder)
      ...     again = run_stages(stages, folder)  # nothing is left to do
      >>> list(again), again["then"].taken.rows()[0][:2]
      (['first', 'then'], ('decoder', 'taken'))
    """
    if jax.process_count() > 1:
        raise ConfigError(
            f"stages: {jax.process_count()} processes are joined, and a plan runs in one; start one"
        )
    check_whole("stages", "save_every", save_every, 0)
    check_whole("stages", "keep", keep, 1)
    stages, folder = tuple(stages), Path(folder)
    outlines = check_stages(stages)
    _begin(stages, folder)
    ended: dict[str, Finished] = {}
    for stage in stages:
        outline, own = outlines[stage.name], folder / stage.name
        scores = _scores(own)
        if scores is None:
            source = ended[stage.source] if stage.source else None
            run = _Run(stage, outline, own, source, save_every, keep, report, stop)
            weights = {name: ended[name].weights() for name in stage.reads}
            scores = run.train(weights) if outline.steps else run.edit(weights)
            if scores is None:
                break
            write_text(own / DONE, to_line({"steps": outline.steps, **scores}) + "\n")
        ended[stage.name] = Finished(
            stage.name, own, outline.steps, scores, outline.taken, outline.params
        )
    return ended


def _begin(stages: Sequence[Stage], folder: Path) -> None:
    """Compares the plan with the one in the folder, and writes it."""
    pages = {stage.name: json.loads(json.dumps(stage.page())) for stage in stages}
    page: dict[str, Json] = {"environment": environment(), "versions": versions()}
    if (folder / PLAN).is_file():
        saved = _read_plan(folder)
        before, names = saved["stages"], list(pages)
        found = environment_differences(saved["environment"])
        if list(before) != names[: len(before)]:
            found.append(f"the stages were {' '.join(before)} and are {' '.join(names)}")
        found += differences(before, {n: p for n, p in pages.items() if n in before}, ())
        if found:
            raise ConfigError(
                f"stages: {folder} holds the run of another plan: {'; '.join(found)}; give the plan"
                " that it was begun with, or another folder"
            )
        if len(before) == len(pages):
            return
        page = saved
    elif folder.exists():
        strange = [p for p in folder.iterdir() if not (is_temporary(p) or p.name == LOCK)]
        if strange:
            raise ConfigError(
                f"stages: {folder} holds {strange[0].name} and is no folder of a plan's run; give"
                " another folder"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PLAN, json.dumps(page | {"stages": pages}, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"stages: {folder} cannot be written ({error.strerror}); give another folder"
        ) from None


def _read_plan(folder: Path) -> Settings:
    where = f"stages: {folder / PLAN}"
    remedy = "put back the file as it was, or give another folder"
    found = parse_json((folder / PLAN).read_bytes(), where, remedy)
    parts = [found.get(n) for n in ("stages", "environment")] if isinstance(found, dict) else [None]
    if not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"{where}: is no plan; {remedy}")
    return found


def _scores(own: Path) -> dict[str, float] | None:
    """What a stage came to; None if it has not ended."""
    if not (own / DONE).is_file():
        return None
    records = read_metrics(own / DONE)
    if len(records) != 1:  # damaged: its last checkpoint has them too
        return None
    return {name: value for name, value in records[0].items() if name != "steps"}


def _newest_good(reader: CheckpointReader, name: str, own: Path) -> int:
    try:
        return reader.newest_good()
    except ConfigError:
        raise ConfigError(
            f"stage {name!r}: no checkpoint in {reader.directory} is whole; remove {own}, and the"
            " stage begins anew with the same results"
        ) from None


def _judged(judge: Judge | None, params: Params) -> dict[str, float]:
    return {} if judge is None else {name: float(x) for name, x in judge(params).items()}


@dataclasses.dataclass(frozen=True)
class _Run:
    """One stage of a run: what `run_stages` was given, and what is known of the stage."""

    stage: Stage
    outline: Outline
    own: Path
    source: Finished | None
    save_every: int
    keep: int
    report: Report
    stop: Callable[[], str | None]

    def edit(self, weights: Mapping[str, Params]) -> dict[str, float]:
        """Saves the weights of an edit, and returns their scores."""
        made = made_by(self.stage, weights)
        assert isinstance(made, Edit)
        with contextlib.ExitStack() as stack:
            saver = stack.enter_context(Checkpointer(self.own / CHECKPOINTS))
            if not saver.steps():  # else it was killed behind the save
                saver.save(0, {"params": jax.tree.map(jnp.asarray, made.params)}, {})
            scores = _judged(made.judge, made.params)
            self._writer(stack, start=-1)({"step": 0} | scores)
        return scores

    def train(self, weights: Mapping[str, Params]) -> dict[str, float] | None:
        """Trains to the end and returns the scores; None if it was stopped before."""
        made, name = made_by(self.stage, weights), self.stage.name
        assert isinstance(made, Training)
        steps, data = made.steps, made.batches
        with contextlib.ExitStack() as stack:
            saver = stack.enter_context(Checkpointer(self.own / CHECKPOINTS, keep=self.keep))
            start, scores = 0, dict[str, float]()
            if saver.steps():
                state, meta, start = saver.restore(
                    made.state, step=_newest_good(saver, name, self.own)
                )
                data.set_state(meta["data"])
                scores = meta["scores"]
                log.info("stage %s: goes on from step %d of %d", name, start, steps)
            elif self.source is None:
                state = made.state
            else:
                assert self.outline.taken is not None
                log.info("stage %s\n%s", name, self.outline.taken)
                where = self.source.checkpoint().directory
                state = take_over(self.stage, made, self.outline.taken, where)
            step, judge = made.step, made.judge
            del made  # and with it a state that may not be the one that is trained
            report = self._writer(stack, start)

            def save(number: int, state: TrainState) -> None:
                nonlocal scores
                if number == steps and judge is not None:
                    scores = _judged(judge, state.params)
                    report({"step": number} | scores)
                saver.save(number, state, {"data": data.get_state(), "scores": scores})

            state = fit(
                state, step, data, steps=steps, report=report, every=((self.save_every, save),),
                stop=self.stop,
            )  # fmt: skip
            reached = int(state.step)
        return scores if reached == steps else None

    def _writer(self, stack: contextlib.ExitStack, start: int) -> Callable[[Settings], None]:
        """Returns what takes a record, in the log of the stage up to a step."""
        flat = {n: x for n, x in self.stage.page().items() if not isinstance(x, Mapping)}
        writer = MetricsWriter(self.own, flat, start=start)
        stack.callback(writer.close)

        def report(record: Settings) -> None:
            writer.write(record)
            self.report(self.stage.name, record)

        return report
