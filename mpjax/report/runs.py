"""What finished runs left in their folders: manifest, metrics, monitor and audit."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpjax.errors import ConfigError, brief, listed
from mpjax.json_text import read_json

METRICS, MANIFEST, OUTCOME = "metrics.jsonl", "manifest.json", "outcome.json"
MONITOR, AUDIT = "monitor.jsonl", "audit.json"
_SEED = re.compile(r"seed\d+")
# Settings in which the seeds of one arm may differ; those of the second line name other arms.
_MAY_DIFFER = {
    "seed", "seeds", "out", "fresh", "resume",
    "precision", "export", "augment", "methods", "teacher_weights", "top",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
      folder: where it lies.
      manifest: what it depended on; empty if there is none.
      records: all of `metrics.jsonl`.
      bytes_per_parameter: NaN if it is not written down.
    """

    folder: Path
    manifest: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    bytes_per_parameter: float


def read_run(folder: Path) -> Run:
    """Returns what the folder of a run holds.

    Raises:
      ConfigError: it is none, or its files are damaged.
    """
    if not (folder / METRICS).is_file():
        inside = [one.parent.relative_to(folder) for one in sorted(folder.glob(f"*/*/{METRICS}"))]
        inside += [one.parent.relative_to(folder) for one in sorted(folder.glob(f"*/{METRICS}"))]
        hint = f"it holds runs in {listed(map(str, inside), 4)}; name one" if inside else (
            "give the folder that --out named"
        )  # fmt: skip
        what = f"holds no {METRICS}" if folder.is_dir() else "is no folder"
        raise ConfigError(f"run: {folder} {what}, so it is no run; {hint}")
    page = read_manifest(folder)
    records = _lines(folder / METRICS)
    known: Any = page.get("bytes_per_parameter", math.nan)
    if (folder / OUTCOME).is_file():  # of a comparison's run, written at its end
        known = read_json(folder / OUTCOME, "train it again").get("bytes_per_parameter", known)
    return Run(folder, page, records, known if isinstance(known, int | float) else math.nan)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a run, empty if there is none.

    Raises:
      ConfigError: it is damaged.
    """
    from mpjax.train import read_manifest  # here: the pages of comparisons need no train step

    if not (folder / MANIFEST).is_file():
        return {}
    if (found := read_manifest(folder)) is None:
        raise ConfigError(
            f"run: {folder / MANIFEST} is damaged; resume the run, which writes it anew, or remove"
            " the file: the report then has no settings"
        )
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; a last line that a kill has cut is left out."""
    from mpjax.train import read_metrics  # here: as above

    found = read_metrics(path)
    content = path.read_bytes()
    lost = sum(1 for line in content.splitlines() if line.strip()) - len(found)
    if lost > (not content.endswith(b"\n")):
        raise ConfigError(
            f"run: {path} is damaged: {lost} of its lines are no JSON object; remove them, or"
            " resume the run, which moves them away"
        )
    return found


def step_records(label: str, records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a record a step, with the validation of the step in it.

    Records before the first loss scale or count of skipped steps get 1.0 and 0. A record with a
    `validation_loss` at the step of the one before it is the validation of that step, and what else
    it holds are scores, which go into the step's record if it has no such field.

    Raises:
      ConfigError: as `Outcome.from_records`.
    """
    from mpjax.train.report.metrics_writer import plain  # here: as above

    found: list[dict[str, Any]] = []
    judged: list[dict[str, Any]] = []
    scale, skipped = 1.0, 0
    for record in map(plain, records):
        for name in ("loss", "validation_loss", "tokens_per_s", "loss_scale", "skipped"):
            if name in record:
                _check_number(label, record, name)
        step, before = record["step"], found[-1]["step"] if found else None
        if "loss" not in record or ("validation_loss" in record and step == before):
            judged.append(record)
            continue
        if before is not None and step <= before:
            raise ConfigError(
                f"outcome {label!r}: step {step} follows step {before}; give one record a step, in"
                " order, and each seed a list of its own"
            )
        scale, skipped = record.get("loss_scale", scale), record.get("skipped", skipped)
        found.append(record | {"loss_scale": scale, "skipped": skipped})
    if not found:
        raise ConfigError(
            f"outcome {label!r}: no record has a loss; give one a step: {{'step': 1, 'loss': 3.0}}"
        )
    by_step = {record["step"]: record for record in found}
    for scores in judged:
        step = scores["step"]
        if step not in by_step:  # of a log of each tenth step: the one before, or the first
            step = max((s for s in by_step if s <= step), default=found[0]["step"])
        by_step[step] |= {k: v for k, v in scores.items() if k not in by_step[step]}
        if "validation_loss" in scores:
            by_step[step]["validation_loss"] = scores["validation_loss"]
    return found


def _check_number(label: str, record: Mapping[str, Any], name: str) -> None:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"outcome {label!r}: {name} {brief(value)} at step {record['step']}; give a number"
        )


def seeds_of(folder: Path) -> list[Path]:
    """Returns the folders of an arm's seeds, or the folder itself."""
    seeds = [
        one.parent for one in folder.glob(f"seed*/{METRICS}") if _SEED.fullmatch(one.parent.name)
    ]
    own = (folder / METRICS).is_file()
    return [folder] if own or not seeds else sorted(seeds, key=lambda one: int(one.name[4:]))


def arms_of(folder: Path) -> list[Path]:
    """Returns the folders of a comparison's arms, or the folder itself if it is an arm or a run."""
    if (folder / METRICS).is_file() or seeds_of(folder) != [folder]:
        return [folder]
    runs = [*folder.glob(f"**/seed*/{METRICS}"), *folder.glob(f"*/{METRICS}")]
    arms = {one.parent.parent if _SEED.fullmatch(one.parent.name) else one.parent for one in runs}
    return sorted(arms) or [folder]


def begun(folder: Path) -> str:
    """Returns when the first run of an arm began; empty if its manifest does not say.

    Raises:
      ConfigError: the manifest is damaged.
    """
    return str(read_manifest(seeds_of(folder)[0]).get("started", ""))


def label_of(folders: Sequence[Path]) -> str:
    """Returns what an arm is called: the name of its folder."""
    first = folders[0].resolve()
    return first.parent.name if _SEED.fullmatch(first.name) else first.name


def check_alike(found: Sequence[Run]) -> None:
    """Refuses runs of one arm that differ in more than their seed.

    Raises:
      ConfigError: names the first setting that differs.
    """
    pages = [run.manifest.get("config", {}) for run in found]
    pages = [
        page | {"precision": run.manifest.get("precision_text")}
        for page, run in zip(pages, found, strict=True)
    ]
    for page, run in zip(pages[1:], found[1:], strict=True):
        for name in sorted({*page, *pages[0]} - _MAY_DIFFER):
            if page.get(name) != pages[0].get(name):
                raise ConfigError(
                    f"outcome: {found[0].folder} and {run.folder} are no seeds of one arm: {name}"
                    f" {brief(pages[0].get(name))} and {brief(page.get(name))}; make an outcome of"
                    " each"
                )


def folders_in(out: Path, labels: Sequence[str]) -> dict[str, tuple[Path, ...]]:
    """Returns the runs of a comparison's arms, where they lie as `LABEL/seed0`, `LABEL/seed1` ...

    Characters that no name of a folder should have may be `_` there.
    """
    by_name = {_plain(label): label for label in labels}
    found: dict[str, tuple[Path, ...]] = {}
    for arm in arms_of(out) if out.is_dir() else ():
        if arm != out and (label := by_name.get(_plain(arm.relative_to(out).as_posix()))):
            found[label] = tuple(seeds_of(arm))
    return found


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name)


def measured(folders: Sequence[Path]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yields step and records of the last measurement of the first run that was monitored."""
    for folder in folders:
        if (folder / MONITOR).is_file() and (records := _lines(folder / MONITOR)):
            step = records[-1]["step"]
            yield step, [record for record in records if record["step"] == step]
            return


def audits(folders: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yields what `Audit.to_dict` gave for the first run that was audited."""
    for folder in folders:
        if (folder / AUDIT).is_file():
            yield read_json(folder / AUDIT, "remove it, and audit the run again")
            return
