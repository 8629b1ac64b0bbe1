"""The workhorse: train a decoder language model under any Precision.

Run:       python experiments/train_lm.py --precision bf16 --steps 500 --out runs/bf16
           python experiments/train_lm.py --rule '**/norm*=fp32' --rule 'decoder/head=fp32' \
               --precision low-bf16 --model small --tokenizer bpe:4096 --mesh data=2,fsdp=2,tensor=2
           python experiments/train_lm.py --precision-schedule late:fp8:bf16:0.1 --out runs/late
Resume:    the same command with --resume latest; results are the same bits as without the stop.
Output:    manifest.json, metrics.jsonl, report.html, tensorboard/ and checkpoints/ in --out, and a
           sample. A run that stops on gradients that are not finite prints what broke, and leaves
           replay/ for `python -m mpjax.replay OUT`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from pathlib import Path

from common import launch  # sets XLA flags before JAX starts

import jax  # isort: skip
from common.datasets.sources import DOCUMENTS
from common.lm import CHECKPOINTS, Judge, agreed, eval_precision, lm_model, prompt_ids, sample
from common.lm_config import MAY_CHANGE, PRECISION, Config, settings
from mpjax.data import (
    Corpus,
    PackedBatches,
    Tokenizer,
    batches,
    document_examples,
    load_corpus,
    packed_batches,
)
from mpjax.data.pipeline import TrainingBatches
from mpjax.errors import ConfigError
from mpjax.files import write_text
from mpjax.interpret import audit
from mpjax.models import Decoder
from mpjax.optim import make_optimizer
from mpjax.precision import Precision, PrecisionSchedule, get_precision
from mpjax.report import page_of_runs, plot_heatmap, save_plot
from mpjax.train import (
    Checkpointer,
    CheckpointReader,
    Interrupt,
    MetricsWriter,
    ProgressBar,
    TensorWriter,
    TrainState,
    TrainStep,
    build,
    bytes_per_parameter,
    check_batch,
    environment,
    fit,
    joined,
    manifest,
    parse_mesh,
    read_manifest,
    restore_into,
    with_weights,
    write_manifest,
)
from mpjax.train.checkpoint import compare_settings, explain, save_bundle
from mpjax.train.report import (
    MANIFEST,
    METRICS,
    formula,
    how_products_run,
    import_wandb,
    require_same_environment,
    watched,
)
from mpjax.typing import Batch, Settings

log = logging.getLogger("mpjax.experiments")


def chosen_step(config: Config, checkpoints: CheckpointReader) -> int | None:
    """The checkpoint to resume from, or None for a new run.

    Raises:
      ConfigError: there is none, or there is one and --resume was not given.
    """
    steps = checkpoints.steps()
    if not config.resume:
        if steps or (config.out / METRICS).exists():
            raise ConfigError(
                f"out: {config.out} holds a run already (checkpoints at {steps or 'no'} steps);"
                " add --resume latest or choose another --out"
            )
        return None
    if not steps and (config.out / MANIFEST).exists():  # it died before its first save
        log.info("resume: %s holds no checkpoint yet; starting at step 0", config.out)
        return None
    if not steps:
        raise ConfigError(f"resume: {config.out} holds no checkpoint; leave --resume out")
    if config.resume == "latest":
        return steps[-1]
    if config.resume == "latest-good":
        return checkpoints.newest_good()
    if not config.resume.isdigit() or int(config.resume) not in steps:
        raise ConfigError(
            f"resume: {config.resume!r} is neither latest, latest-good nor one of the steps"
            f" {' '.join(map(str, steps))}"
        )
    return int(config.resume)


@dataclasses.dataclass(frozen=True)
class Run:
    """All parts of a run that begins or goes on."""

    config: Config
    precision: Precision
    schedule: PrecisionSchedule | None
    corpus: Corpus
    model: Decoder
    state: TrainState
    step: TrainStep
    data: TrainingBatches | PackedBatches
    judge: Judge
    start: int

    @property
    def models(self) -> list[Decoder]:
        """The model in each precision that it is trained in."""
        precisions = self.schedule.precisions if self.schedule else (self.precision,)
        return [dataclasses.replace(self.model, precision=p) for p in precisions]


def optimizer_settings(config: Config) -> Settings:
    """The arguments of `make_optimizer`."""
    return {
        "name": config.optimizer, "lr": config.lr, "schedule": config.schedule,
        "steps": config.steps, "warmup": launch.warmup(config), "weight_decay": config.weight_decay,
    }  # fmt: skip


def build_settings(config: Config) -> Settings:
    """The arguments of `build` behind the mesh."""
    schedule = config.resolved_schedule()
    return {
        "seed": config.seed, "clip": config.clip or None, "patience": config.patience,
        "accumulate": config.accumulate, "schedule": schedule and schedule.to_dict(),
        "diloco": config.diloco or None,
    }  # fmt: skip


def training_data(config: Config, corpus: Corpus) -> TrainingBatches | PackedBatches:
    """Endless batches of the training text, windows of it or packed documents."""
    options: Settings = {
        "batch": config.batch, "seed": config.seed, "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }  # fmt: skip
    if not config.pack:
        return batches(corpus.train, seq=config.seq, **options)
    documents = document_examples(corpus.train, corpus.tokenizer)
    return packed_batches(documents, length=config.seq, longer="split", **options)


def prepare(config: Config) -> Run:
    """Builds everything, and restores; nothing is written before all of it has been checked."""
    launch.positive(
        config, "steps", "batch", "seq", "accumulate", "lr", "eval_batches", "keep", "patience"
    )
    launch.not_negative(
        config, "warmup", "eval_every", "save_every", "keep_best", "sample", "clip", "seed",
        "weight_decay", "monitor_every", "monitor_sample",
    )  # fmt: skip
    if config.recast and not config.resume:
        raise ConfigError("recast: needs --resume; a new run takes weights with --init-from DIR")
    precision, schedule, mesh = (
        config.resolved(),
        config.resolved_schedule(),
        parse_mesh(config.mesh),
    )
    eval_precision(config.judged_in())
    check_batch(config.batch, config.accumulate, mesh)
    if config.wandb:
        import_wandb()
    raw = make_optimizer(**optimizer_settings(config))
    other = CheckpointReader(Path(config.init_from) / CHECKPOINTS)
    if config.init_from and not other.steps():
        raise ConfigError(f"init_from: {config.init_from} holds no checkpoint; give a run's folder")
    saved = CheckpointReader(config.out / CHECKPOINTS)
    start = chosen_step(config, saved)
    if start is not None and config.init_from:
        raise ConfigError(
            f"init_from: {config.out} has checkpoints to resume from; leave --init-from out"
        )
    if config.resume and start is None:  # as the run that died before its first save
        name, page = "init_from", read_manifest(config.out)
        if page is None:
            log.warning("resume: damaged manifest in %s; --init-from is not compared", config.out)
        else:
            begun, now = page.get("config", {}).get(name), settings(config)[name]
            compare_settings({name: begun}, {name: now}, may_change=())
    meta: Settings = {}
    tokenizer: str | Tokenizer = config.tokenizer
    if start is not None:
        meta = saved.read_meta(start)
        may_change: tuple[str, ...] = MAY_CHANGE
        if config.recast:
            may_change += PRECISION
        steps = meta["config"]["steps"]
        over_steps = [f"--schedule {config.schedule}"] * (config.schedule != "constant")
        if schedule and schedule.kind == "late":
            over_steps.append(f"--precision-schedule {config.precision_schedule}")
        if steps != config.steps and over_steps:
            raise ConfigError(
                f"steps: {config.steps} now, {steps} at the save, and {' and '.join(over_steps)}"
                f" runs over all steps; resume with --steps {steps}, or start a new run of its"
                f" weights with --init-from {config.out} and another --out"
            )
        compare_settings(meta["config"], settings(config), may_change=may_change)
        if "environment" in meta:
            require_same_environment(meta["environment"])
        else:
            log.info("resume: the checkpoint does not say its environment; it is not compared")
        tokenizer = Tokenizer.from_text(meta["tokenizer"])
    corpus = load_corpus(config.data, tokenizer, held_out=config.held_out, sources=DOCUMENTS)
    if meta:
        compare_settings({"data": meta["corpus"]}, {"data": corpus.info}, may_change=())
    model = lm_model(config.model, config.shape, precision, corpus.tokenizer.vocab_size, config.seq)
    if config.sample:
        prompt_ids(model, corpus.tokenizer, config.prompt)
    data = training_data(config, corpus)
    state, step = build(model, raw, mesh, **build_settings(config))
    judge = Judge(model, config.judged_in(), corpus, config, step)
    if start is not None:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        if config.recast:
            state, lines = restore_into(state, saved, start)
            for line in lines:
                log.info("recast: %s", line)
            if state.switch is not None and "precision_schedule" not in meta:
                state = joined(state)
        else:
            state, meta, _ = saved.restore(abstract, step=start)
        data.set_state(meta["data"])
    elif config.init_from:
        # Weights and their master copies; moments, counters and data begin anew.
        copies = {"update_state": state.opt_state.update_state}
        fresh = {"params": state.params, "opt_state": copies}
        fresh, lines = restore_into(fresh, other, other.newest_good())
        opt_state = state.opt_state._replace(update_state=fresh["opt_state"]["update_state"])
        state = with_weights(state, fresh["params"], opt_state)
        for line in lines:
            if "only in the checkpoint" not in line:
                log.info("init_from: %s", line)
    return Run(config, precision, schedule, corpus, model, state, step, data, judge, start or 0)


def monitored(run: Run, stack: contextlib.ExitStack) -> TrainStep:
    """The train step, with its tensors measured if that is asked for."""
    config = run.config
    if not config.monitor_every:
        return run.step
    writer = TensorWriter(config.out, start=run.start) if jax.process_index() == 0 else None

    def draw() -> None:
        if writer and writer.last:
            title = f"What each format would lose: {run.precision.name}, step {writer.last_step}"
            save_plot(plot_heatmap(writer.last, title=title), config.out / "monitor.png")

    if writer:
        stack.callback(writer.close)
        stack.callback(draw)
    report = writer.write if writer else lambda number, seen: None
    return watched(
        run.step, report, every=config.monitor_every, start=run.start, sample=config.monitor_sample
    )


def write_audit(run: Run) -> None:
    """Writes what the first step's program runs; it is traced, and no data is used up."""
    position = run.data.get_state()
    taken, plain = run.step.active(run.state)
    found = audit(taken.function, plain, next(run.data))
    run.data.set_state(position)
    write_text(run.config.out / "audit.json", json.dumps(found.to_dict()) + "\n")


def train(run: Run) -> tuple[TrainState, str | None]:
    """Trains to the end or to a signal; checkpoints either way."""
    config, first = run.config, jax.process_index() == 0
    values = settings(config)
    meta = {
        "config": values,
        "tokenizer": run.corpus.tokenizer.to_text(),
        "corpus": run.corpus.info,
        "environment": environment(),
    }
    if run.schedule:
        meta["precision_schedule"] = run.schedule.to_dict()
    validation: dict[int, float] = {}
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpointer(config.out / CHECKPOINTS, keep=config.keep, keep_best=config.keep_best)
        )
        if run.start:
            checkpoints.resume_from(run.start)
        flat = values | values["shape"] | {"precision": run.precision.to_text()}
        del flat["shape"]
        writer = (
            MetricsWriter(config.out, flat, start=run.start, wandb=config.wandb) if first else None
        )
        if writer:
            stack.callback(writer.close)
        bar = stack.enter_context(ProgressBar(config.steps, run.start))
        interrupt = stack.enter_context(Interrupt())

        def report(record: Settings) -> None:
            if writer:
                writer.write(record)
                bar.update(record)

        def evaluate(number: int, state: TrainState) -> None:
            validation[number] = run.judge(state.params)
            report({"step": number, "validation_loss": validation[number]})

        def save(number: int, state: TrainState) -> None:
            if config.keep_best and number not in validation:
                evaluate(number, state)
            metrics = {"validation_loss": validation[number]} if number in validation else {}
            taken, _ = run.step.active(state)
            # The optimizer of replicas that train apart is that of their outer steps.
            active = run.precision if config.diloco else taken.optimizer.precision
            now = {"precision": active.to_dict()}
            now["data"] = run.data.get_state()
            checkpoints.save(number, state, meta | now, metrics=metrics)

        state = fit(
            run.state, monitored(run, stack), run.data, steps=config.steps, report=report,
            every=((config.eval_every, evaluate), (config.save_every, save)),
            stop=agreed(lambda: interrupt.requested), stuck=functools.partial(leave_bundle, run),
        )  # fmt: skip
        early = int(state.step) < config.steps  # what all processes agree on
        return state, (interrupt.requested or "a signal") if early else None


def leave_bundle(run: Run, number: int, state: TrainState, batch: Batch) -> None:
    """Writes what `python -m mpjax.replay` needs, and prints what broke."""
    config = run.config
    meta = {
        "model": dataclasses.asdict(run.model.config), "precision": run.precision.to_dict(),
        "optimizer": optimizer_settings(config), "build": build_settings(config),
        "mesh": config.mesh, "devices": jax.device_count(), "config": settings(config),
    }  # fmt: skip
    folder = save_bundle(config.out, number, state, batch, meta)
    if jax.process_count() > 1:  # one process alone cannot run the others' part of a step
        log.warning("stopped; python -m mpjax.replay %s says what broke", config.out)
        return
    log.warning("stopped; looking for what broke, which compiles the step a few times")
    log.warning("%s", explain(run.step, state, batch, folder))
    log.warning("python -m mpjax.replay %s runs it again", config.out)


def main(config: Config) -> None:
    """Trains, validates, saves and samples."""
    console = launch.wide()
    console.quiet = jax.process_index() != 0
    run = prepare(config)
    launch.writable(config.out)
    if jax.process_index() == 0:
        recipes = [recipe for model in run.models for recipe in model.recipes.values()]
        found = how_products_run(recipes, config.batch * config.seq)
        page = manifest(
            run.precision, settings(config), run.model.paths, found, schedule=run.schedule
        )
        page["bytes_per_parameter"] = bytes_per_parameter(run.state)
        page["attention"] = run.model.attention_kernels(config.seq, masked=config.pack)
        write_manifest(config.out, page)
        for shown in [*filter(None, [run.schedule]), *(model.precision for model in run.models)]:
            console.print(str(shown), highlight=False, markup=False)
        for name, runs in found.items():
            lines = "; ".join(f"{product}: {how}" for product, how in runs.items())
            console.print(f"recipe {name} here: {lines}", highlight=False, markup=False)
        if isinstance(run.data, PackedBatches):
            share = run.data.padding()
            console.print(f"packed documents: {share:.2%} of the rows is padding", highlight=False)
        console.print(f"state: {formula(run.state)}\n{launch.machine()}", highlight=False)
    if run.start >= config.steps:
        console.print(f"step {run.start} of {config.steps}: nothing left to train; raise --steps")
        return
    if config.audit and jax.process_index() == 0:
        write_audit(run)
    state, signal = train(run)
    loss, judged = run.judge.last, get_precision(config.judged_in()).name
    console.print(f"step {int(state.step)}: validation loss {loss:.4f} in {judged}")
    if jax.process_index() == 0:
        write_text(config.out / "report.html", page_of_runs(config.out))
        console.print(f"report: {config.out / 'report.html'}", highlight=False)
    if signal:
        console.print(f"stopped by {signal}; the same command with --resume latest goes on")
    elif config.sample:
        taken, plain = run.step.active(state)
        model = dataclasses.replace(run.model, precision=taken.optimizer.precision)
        text = sample(
            model, plain.params, run.corpus.tokenizer, config.prompt, config.sample,
            state=plain.model_state,
        )  # fmt: skip
        console.print(text, highlight=False, markup=False)


if __name__ == "__main__":
    launch.command(main, Config)
