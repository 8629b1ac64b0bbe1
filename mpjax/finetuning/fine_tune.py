"""One run: train, judge, keep the best, stop early, go on after a kill with the same bits."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from mpjax.errors import ConfigError
from mpjax.files import write_text
from mpjax.finetuning.finetuning_settings import Finetuning
from mpjax.finetuning.of_decoders import Instructions
from mpjax.finetuning.pretrained import from_pretrained
from mpjax.finetuning.report import write_report_of
from mpjax.finetuning.run_folder import BEST, CHECKPOINTS, FILES, RUN, TOKENIZER, RunPage
from mpjax.finetuning.sources import read_source
from mpjax.finetuning.tuned import Tuned, load_run
from mpjax.finetuning.work import Lines, Scores
from mpjax.models import save_weights
from mpjax.models.hf import check_export, open_checkpoint
from mpjax.optim import make_optimizer
from mpjax.precision import PrecisionSchedule, fixed, get_precision, get_schedule
from mpjax.precision.schedule import KINDS
from mpjax.train import (
    Checkpointer,
    CheckpointReader,
    Interrupt,
    MetricsWriter,
    ProgressBar,
    TrainState,
    build,
    check_batch,
    fit,
    manifest,
    parse_mesh,
    read_manifest,
    write_manifest,
)
from mpjax.train.checkpoint import compare_settings
from mpjax.train.report import (
    MANIFEST,
    begin_wandb,
    how_products_run,
    import_wandb,
    require_same_environment,
)
from mpjax.train.report.metrics_writer import WANDB_ID
from mpjax.typing import Params, Settings

log = logging.getLogger("mpjax.finetuning")
# Of a manifest: what names of presets and recipes stood for.
_MEANT = ("policies", "precision_schedule", "recipes")
LESS_IS_BETTER = ("loss", "perplexity", "calibration error")


class _Enough(Exception):
    """Ends a run whose judgements are no longer better."""


@dataclasses.dataclass
class Progress:
    """The judgements of a run so far.

    Args:
      metric: that ranks them.
      found: (step, scores) of each.
    """

    metric: str
    found: list[tuple[int, Scores]] = dataclasses.field(default_factory=list)

    def _worth(self, scores: Scores) -> tuple[float, float]:
        """The metric and, between equal ones, the loss; more is better."""
        value, loss = scores[self.metric], scores["loss"]
        worth = -value if self.metric in LESS_IS_BETTER else value
        return tuple(-math.inf if math.isnan(x) else x for x in (worth, -loss))  # type: ignore[return-value]

    @property
    def best(self) -> int:
        """Place of the best judgement, the first of equal ones."""
        worths = [self._worth(scores) for _, scores in self.found]
        return worths.index(max(worths))

    def enough(self, patience: int) -> bool:
        """Whether the best one lies so many judgements back."""
        return bool(patience) and len(self.found) - 1 - self.best >= patience


def finetune(
    data: Any,
    *,
    show: Callable[[Lines], None] = lambda lines: None,
    quiet: bool = True,
    **settings: Any,
) -> Tuned:
    """Fine-tunes a model on data of your own; the best weights by a named metric are kept.

    Args:
      data: a table (``.csv``, ``.tsv``, ``.jsonl``, ``.parquet``, ``hf:NAME``), a data set of
        Hugging Face, a data frame, a dict of columns, dicts; a file of word<TAB>tag lines (`tag`);
        documents (`lm`).
      show: called once with what was read, as (what, how much).
      quiet: whether no progress bar is shown.
      settings: fields of `Finetuning`, such as `task`, `model`, `precision`, `epochs` and `out`.

    Returns:
      The run with its best weights: `predict`, `export`, `scores`.

    Raises:
      ConfigError: a setting, data, or a folder that holds another run.
      KeyboardInterrupt: a signal; the run is saved, and `resume=True` goes on.

    Example:
      >>> import tempfile
      >>> rows = [{"text": f"{word} {n}", "label": word} for word in ("good", "bad")
      ...         for n in range(20)]
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     run = finetune(rows, task="classify", epochs=2, layers=1, width=16, out=f"{folder}/a")
      ...     answer = run.predict(["good 3"])[0]
      >>> sorted(answer), run.task.classes
      (['label', 'probability'], ('bad', 'good'))
    """
    return _run(Finetuning.of(settings), data, show, quiet)


def read_precision(text: str) -> PrecisionSchedule:
    """Returns the schedule of a run; a Precision is one that never switches."""
    return get_schedule(text) if text.split(":")[0] in KINDS else fixed(get_precision(text))


def _run(c: Finetuning, data: Any, show: Callable[[Lines], None], quiet: bool) -> Tuned:
    schedule = read_precision(c.precision)
    get_precision(c.eval_precision)
    mesh = parse_mesh(c.mesh)
    check_batch(c.batch, c.accumulate, mesh)
    if c.wandb:
        import_wandb()
    _check_folder(c)
    source = read_source(c, data)
    labels = source.labels
    params, files, config = None, {}, {}
    if c.new:
        tokens = source.tokenizer()
        model = source.new_model(schedule.first, tokens.vocab_size)
    else:
        dropout = {"dropout": c.dropout} if c.task not in ("lm", "instruct") else {}
        model, params, own = from_pretrained(
            open_checkpoint(c.model), schedule.first, task=c.task, labels=labels, seed=c.seed,
            **dropout,
        )  # fmt: skip
        if own is None:
            raise ConfigError(f"model {c.model!r}: no tokenizer.json beside it; add one")
        tokens = own
        if c.longest > model.config.context:
            raise ConfigError(
                f"longest={c.longest}: the model has {model.config.context} positions; lower it"
            )
        labels = tuple(getattr(model.config, "labels", ())) or labels
        files, config = dict(model.metadata.files), dict(model.metadata.config)
        if isinstance(source, Instructions):
            source = dataclasses.replace(source, metadata=model.metadata)
    work = source.work(tokens, labels)
    steps = c.steps or max(1, round(c.epochs * work.epoch))
    schedule = schedule.over(steps)
    every = c.evaluate_every or work.epoch
    optimizer = make_optimizer(
        c.optimizer, c.lr or (1e-3 if c.new else 5e-5), schedule=c.schedule, steps=steps,
        warmup=round(c.warmup * steps), weight_decay=c.weight_decay,
    )  # fmt: skip
    state, step = build(
        model, optimizer, mesh, seed=c.seed, clip=c.clip or None, accumulate=c.accumulate,
        objective=work.task.objective, schedule=schedule, params=params,
    )  # fmt: skip
    del params
    judge = work.judge(dataclasses.replace(model, precision=get_precision(c.eval_precision)))
    page = RunPage(
        settings=c.to_dict(), family=type(model).__name__.lower(),
        config=dataclasses.asdict(model.config), labels=labels,
        tokenizer="wordpiece" if hasattr(tokens, "pieces") else "tokenizer",
        metadata=config, steps=steps, fingerprint=work.fingerprint, data=_told(data),
        lines=work.lines,
    )  # fmt: skip
    progress = Progress(c.metric or work.metric)
    untrained: Scores = {}
    goes_on = bool(CheckpointReader(c.out / CHECKPOINTS).steps())
    if not goes_on:  # before anything is written
        untrained = judge(step.active(state)[1].params)
        if progress.metric not in untrained:
            raise ConfigError(
                f"metric: no score {progress.metric!r}; known: {', '.join(untrained)}"
            )
    found = how_products_run(model.recipes.values(), c.batch * c.longest)
    several = schedule if len(schedule.precisions) > 1 else None
    about = manifest(schedule.first, page.settings, model.paths, found, schedule=several)
    about["attention"] = model.attention_kernels(c.longest, masked=c.task != "lm")
    _compare(c, page, about)
    wandb = begin_wandb(c.wandb, c.flat, c.out, goes_on=goes_on)
    if not (c.out / RUN).is_file():
        page.write(c.out, tokens.to_text(), files)
    show(work.lines)
    if not (c.out / MANIFEST).is_file():
        write_manifest(c.out, about)
    _train(c, work.batches, state, step, judge, progress, untrained, steps, every, quiet, wandb)
    write_report_of(c.out)
    run = load_run(c.out)
    if c.export:
        run.export(c.export)
    return run


def _train(
    c: Finetuning, data: Any, state: TrainState, step: Any, judge: Callable[[Any], Scores],
    progress: Progress, untrained: Scores, steps: int, every: int, quiet: bool, wandb: Any,
) -> None:  # fmt: skip
    with contextlib.ExitStack() as stack:
        saver = stack.enter_context(Checkpointer(c.out / CHECKPOINTS, keep=2))
        start = 0
        if saver.steps():
            state, meta, start = saver.restore(state, good_only=True)
            data.set_state(meta["data"])
            progress.found = [(number, scores) for number, scores in meta["found"]]
            log.info("%s: goes on from step %d of %d", c.out, start, steps)
        # Without a checkpoint the log begins anew, with its record of step 0.
        first = -1 if untrained else start
        if start == steps or progress.found and progress.enough(c.patience):
            return
        writer = MetricsWriter(c.out, c.flat, start=first, wandb=wandb)
        stack.callback(writer.close)
        bar = None if quiet else stack.enter_context(ProgressBar(steps, start))
        interrupt = stack.enter_context(Interrupt())

        def report(record: Settings) -> None:
            writer.write(record)
            if bar is not None:
                bar.update(record)

        def tell(number: int, scores: Scores) -> None:
            names = {name: name.replace(" ", "_") for name in scores} | {"loss": "validation_loss"}
            report({"step": number} | {names[name]: x for name, x in scores.items()})

        def evaluate(number: int, state: TrainState) -> None:
            params = step.active(state)[1].params
            scores = {name: float(x) for name, x in judge(params).items()}
            tell(number, scores)
            progress.found.append((number, scores))
            if progress.best == len(progress.found) - 1:
                _keep_best(c.out, number, scores, params)

        def act(number: int, state: TrainState) -> None:
            judged = number % every == 0 or number == steps
            if judged:
                evaluate(number, state)
            meta: Settings = {"data": data.get_state(), "found": progress.found}
            saver.save(number, state, meta)
            if judged and progress.enough(c.patience):
                raise _Enough

        if untrained:
            tell(0, untrained)
        try:
            state = fit(
                state, step, data, steps=steps, report=report, every=((every, act),),
                stop=lambda: interrupt.requested,
            )  # fmt: skip
        except _Enough:
            log.info("%s: no better %s in %d judgements; ended", c.out, progress.metric, c.patience)
            return
        reached = int(state.step)
        if reached < steps:
            raise KeyboardInterrupt(
                f"{c.out}: stopped by {interrupt.requested} at step {reached} of {steps}; the same"
                " call with resume goes on"
            )


def _keep_best(out: Path, step: int, scores: Scores, params: Params) -> None:
    """Writes the weights, then the line that names them, then removes older ones."""
    name = f"best-{step}.safetensors"
    save_weights(jax.device_get(params), out / name)
    write_text(out / BEST, json.dumps({"step": step, "weights": name, "scores": scores}) + "\n")
    for path in out.glob("best-*.safetensors"):
        if path.name != name:
            path.unlink()


def _told(data: Any) -> str:
    """What the data was, in words."""
    if isinstance(data, str | Path):
        return str(data)
    return f"{type(data).__module__}.{type(data).__name__}"


def _check_folder(c: Finetuning) -> None:
    """Checks, before anything is read, that the folder is free or holds a run to go on with.

    And that there is room for an export.
    """
    if c.export:
        if c.task == "seq2seq":
            raise ConfigError("export: transformers has no such encoder-decoder; leave it out")
        check_export(c.export)
    if (c.out / RUN).is_file():
        if not c.resume:
            raise ConfigError(
                f"out: {c.out} holds a run already; go on with it by resume, or choose another"
            )
    elif c.out.is_dir() and any(
        # The page is written last: a run that was killed before has left these.
        not p.name.startswith(".") and p.name not in (TOKENIZER, FILES, "wandb", WANDB_ID)
        for p in c.out.iterdir()
    ):
        raise ConfigError(f"out: {c.out} holds something else; choose another folder")
    elif c.out.exists() and not c.out.is_dir():
        raise ConfigError(f"out: {c.out} is a file; choose another folder")


def _compare(c: Finetuning, page: RunPage, about: Settings) -> None:
    """Compares what the run is with what the folder holds, if it holds one."""
    held_about = read_manifest(c.out) if (c.out / MANIFEST).is_file() else None
    for name in _MEANT:  # a name of the user's may stand for something else by now
        if held_about is not None and name in held_about:
            compare_settings({name: held_about[name]}, {name: about[name]}, may_change=())
    if (c.out / RUN).is_file():
        held = RunPage.read(c.out)
        compare_settings(held.settings, page.settings, may_change=())
        compare_settings({"data": held.fingerprint}, {"data": page.fingerprint}, may_change=())
        require_same_environment(held.environment)
