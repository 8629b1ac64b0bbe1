"""From data to a model in use: every task, the best weights, early stop, resume, answers."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.finetuning import fine_tune, finetune, load_run
from mpjax.finetuning.fine_tune import Progress
from mpjax.finetuning.finetuning_settings import Finetuning
from mpjax.finetuning.sources import read_source
from mpjax.precision import get_precision, presets, register_preset
from mpjax.train import read_metrics
from tests.train.report.test_metrics_writer import FakeWandb

pytestmark = pytest.mark.usefixtures("fast_compile")
GOOD, BAD = ("lovely", "great", "fine"), ("awful", "stale", "poor")
SMALL: dict[str, Any] = dict(layers=1, width=16, heads=2, vocabulary=300, longest=16, batch=8)


def reviews(count: int = 64) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {"review": f"the soup {n} was {draw.choice(GOOD if n % 2 else BAD)}", "stars": n % 2}
        for n in range(count)
    ]


def data_of(task: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Data and settings of a task."""
    rows = reviews()
    if task == "classify":
        return rows, {"text": "review", "label": "stars"}
    if task == "pair":
        pairs = [r | {"other": f"so {'yes' if r['stars'] else 'no'}"} for r in rows]
        return pairs, {"text": "review", "label": "stars", "second": "other"}
    if task == "regress":
        columns = {"text": [r["review"] for r in rows], "label": [r["stars"] / 2 for r in rows]}
        return columns | {"other": ["so"] * len(rows)}, {"second": "other"}
    if task == "tag":
        path = folder / "words.tsv"
        lines = ["".join(f"{w}\t{'O' if w != 'soup' else 'B-FOOD'}\n" for w in r["review"].split())
                 for r in rows]  # fmt: skip
        path.write_text("\n".join(lines))
        return str(path), {}
    if task == "lm":
        path = folder / "text.jsonl"
        path.write_text("".join(json.dumps({"body": r["review"] * 3}) + "\n" for r in rows))
        return str(path), {"text": "body"}
    names = ("prompt", "answer") if task == "instruct" else ("source", "target")
    return [dict(zip(names, (f"say {n % 4}", f"it is {n % 4}"), strict=True)) | {"n": n}
            for n in range(64)], {}  # fmt: skip


@pytest.mark.parametrize("task", ["pair", "regress", "tag", "seq2seq", "lm", "instruct"])
def test_every_task_trains_answers_and_loads(task: str, tmp_path: Path) -> None:
    data, settings = data_of(task, tmp_path)
    lines: list[tuple[str, str]] = []
    run = finetune(
        data, task=task, out=tmp_path / "run", steps=12, evaluate_every=4, held_out=0.25,
        show=lines.extend, lr=1e-2, **(SMALL | settings),
    )  # fmt: skip
    asked = (
        ["say 1", "say 2"]
        if task in ("seq2seq", "instruct")
        else ["the soup was great", "a stale soup"]
    )
    seconds = ["so yes", "so no"] if task in ("pair", "regress") else []
    answers = run.predict(asked, seconds, tokens=3)
    again = load_run(tmp_path / "run")
    assert again.predict(asked, seconds, tokens=3) == answers and again.scores == run.scores
    if task in ("seq2seq", "lm", "instruct"):
        with pytest.raises(ConfigError, match=f"vectors: a model of task '{task}' has none"):
            run.export(tmp_path / "vectors", vectors=True)
        assert not (tmp_path / "vectors").exists()
    if task in ("lm", "instruct"):  # of several lengths, three at a time; the last has little room
        several = [*asked, "the", "soup", "a " * 4, "x" * 12]
        alone = [run.predict([one], tokens=9)[0] for one in several]
        assert run.predict(several, tokens=9, batch=3) == alone
        assert len({one["text"] for one in alone}) > 1
    keys = {"regress": {"value"}, "tag": {"words", "tags"}}
    text = {"seq2seq", "lm", "instruct"}
    wanted = {"text"} if task in text else keys.get(task, {"label", "probability"})
    assert all(set(answer) == wanted for answer in answers) and lines
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    judged = {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}
    assert list(judged) == [0, 4, 8, 12] and run.step in judged
    assert run.scores["loss"] == judged[run.step] < judged[0]
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"| {run.step}, the best | " in report and all(
        f"| {a} | {b} |" in report for a, b in lines
    )
    units = {"pair": "nats/text", "regress": "squared error", "tag": "nats/word"}
    html = (tmp_path / "run" / "report.html").read_text()
    assert "<h1>" in html and units.get(task, "nats/token") in html
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_marks_between_documents_are_no_sentences_of_either_side(tmp_path: Path) -> None:
    for name, word in (("own.tsv", "soup"), ("held.tsv", "bread")):
        (tmp_path / name).write_text(f"-DOCSTART-\tO\n\nthe\tO\n{word}\tB-FOOD\n")
    settings = Finetuning(task="tag", validation=str(tmp_path / "held.tsv"))
    found = read_source(settings, tmp_path / "own.tsv")
    assert (found.train.words, found.test.words) == ((("the", "soup"),), (("the", "bread"),))


def test_counts_add_up_and_equal_texts_stay_together(tmp_path: Path) -> None:
    rows = reviews(40)
    rows += rows[:10]  # repeats
    path = tmp_path / "own.csv"
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["n", "review", "stars"])
        out.writerows([n, r["review"], r["stars"]] for n, r in enumerate(rows))
        out.writerow([99, "", 1])
    options: dict[str, Any] = dict(text="review", label="stars", steps=1, **SMALL)
    with pytest.raises(ConfigError, match=r"line 52: no 'review'; fill it in"):
        finetune(path, out=tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()
    found: dict[str, dict[str, int]] = {}
    for name, more in (("keep", {}), ("drop", {"duplicates": "drop"})):
        lines: list[tuple[str, str]] = []
        finetune(path, out=tmp_path / name, missing="drop", show=lines.extend, **options, **more)
        found[name] = {what: int(n.split(",")[0]) for what, n in lines if n.split(",")[0].isdigit()}
    for name, kept in (("keep", 50), ("drop", 40)):
        f = found[name]
        assert f["data: rows read"] == 51 and f["data: left out, a cell is missing"] == 1
        assert f["data: repeat an earlier row"] == 10
        assert f["for training"] + f["held out"] == kept


def test_balanced_batches_hold_as_many_of_each_class_and_wandb_gets_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"soup {n}", "label": "rare" if n % 8 == 0 else "often"} for n in range(80)]
    lines: list[tuple[str, str]] = []
    labels: list[Any] = []
    real = fine_tune.fit

    def watched(state: Any, step: Any, data: Any, **kwargs: Any) -> Any:
        def seen() -> Any:
            for batch in data:
                labels.append(batch["labels"])
                yield batch

        return real(state, step, seen(), **kwargs)

    monkeypatch.setattr(fine_tune, "fit", watched)
    told: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(told))
    for name, balanced in (("plain", False), ("balanced", True)):
        labels.clear()
        assert not told
        finetune(
            rows, out=tmp_path / name, epochs=1, balanced=balanced, show=lines.extend,
            wandb="mine" if balanced else "", **SMALL,
        )  # fmt: skip
        rare = [int(batch.sum()) for batch in labels]
        assert (set(rare) == {4}) == balanced and len(rare) == 9
    assert ("balanced: times an epoch", "often 0.571, rare 4") in lines
    begun, *points, end = told
    assert (begun["project"], begun["dir"]) == ("mine", str(tmp_path / "balanced"))
    assert begun["config"]["balanced"] == "True" and "wandb" not in begun["config"]
    assert [step for step, _ in points] == [0, 9] and "validation_loss" in points[-1][1]
    assert end == "finish"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb: needs the package wandb"):
        finetune(rows, out=tmp_path / "none", epochs=1, wandb="mine", **SMALL)
    assert not (tmp_path / "none").exists()
    # what cannot be reached leaves no run, so that the same command can be given again
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb([], reachable=False))
    for _ in range(2):
        with pytest.raises(ConfigError, match="wandb: api_key not configured"):
            finetune(rows, out=tmp_path / "again", epochs=1, wandb="mine", **SMALL)
        (tmp_path / "again" / "wandb").mkdir(exist_ok=True)  # as the real one does
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["wandb"]


def test_the_best_step_of_an_overfit_run_is_what_is_kept(tmp_path: Path) -> None:
    """Labels of noise: the loss on held-out texts rises while that in training falls."""
    draw = np.random.default_rng(0)
    rows = [{"text": f"word{draw.integers(40)} word{draw.integers(40)} {n}",
             "label": int(draw.integers(2))} for n in range(80)]  # fmt: skip
    options: dict[str, Any] = dict(metric="loss", held_out=0.4, lr=2e-2, schedule="constant")
    run = finetune(rows, out=tmp_path / "all", steps=60, evaluate_every=6, **options, **SMALL)
    records = read_metrics(tmp_path / "all" / "metrics.jsonl")
    judged = {
        r["step"]: r["validation_loss"] for r in records if "validation_loss" in r and r["step"]
    }
    best = min(judged, key=lambda step: judged[step])
    assert run.step == best < 60 and judged[60] > 1.2 * judged[best]
    assert [p.name for p in (tmp_path / "all").glob("*.safetensors")] == [
        f"best-{best}.safetensors"
    ]
    early = finetune(
        rows, out=tmp_path / "early", steps=60, evaluate_every=6, patience=2, **options, **SMALL
    )
    last = max(r["step"] for r in read_metrics(tmp_path / "early" / "metrics.jsonl"))
    assert early.step == best and last == best + 12 and early.scores == run.scores


def test_progress_ranks_by_the_metric_and_then_by_the_loss() -> None:
    progress = Progress("accuracy", [(1, {"accuracy": 0.5, "loss": 1.0}),
                                     (2, {"accuracy": 0.5, "loss": 0.9}),
                                     (3, {"accuracy": float("nan"), "loss": 0.1})])  # fmt: skip
    assert progress.best == 1 and not progress.enough(2) and progress.enough(1)
    assert not Progress("loss", [(1, {"loss": 2.0}), (2, {"loss": 1.0})]).enough(1)


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_run_that_was_cut_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of processes: `python -m benchmarks.robustness.kill_finetuning`."""
    register_preset(dataclasses.replace(get_precision("fp16"), name="own"))
    save = fine_tune.Checkpointer.save

    def cut_at_6(self: Any, number: int, *args: Any, **kwargs: Any) -> None:
        if number == 6:  # the best weights have been written, the checkpoint has not
            raise Killed
        save(self, number, *args, **kwargs)

    def run(name: str) -> Path:
        finetune(
            reviews(), text="review", label="stars", steps=12, evaluate_every=3, precision="own",
            out=tmp_path / name, resume=True, **SMALL,
        )  # fmt: skip
        return tmp_path / name

    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(fine_tune.Checkpointer, "save", cut_at_6)
        with pytest.raises(Killed):
            run("cut")
    cut = run("cut")
    (tmp_path / "early" / "files").mkdir(parents=True)  # killed before its page was written
    (tmp_path / "early" / "tokenizer.json").write_text("{")
    real = fine_tune.fit
    with monkeypatch.context() as patch:  # and again before its first step
        patch.setattr(fine_tune, "fit", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("early")
    assert fine_tune.fit is real
    early = run("early")
    (best,) = whole.glob("best-*.safetensors")
    assert (cut / best.name).read_bytes() == best.read_bytes()
    assert (cut / "best.json").read_bytes() == (whole / "best.json").read_bytes()
    logs = []
    for folder in (whole, cut, early):
        logs.append(read_metrics(folder / "metrics.jsonl"))
        for record in logs[-1]:
            record.pop("tokens_per_s", None)
    assert repr(logs[0]) == repr(logs[1]) == repr(logs[2]) and len(logs[0]) == 12 + 5
    with pytest.raises(ConfigError, match="out: .* holds a run already; go on with it by resume"):
        finetune(reviews(), text="review", label="stars", out=whole, **SMALL)
    with pytest.raises(ConfigError, match="lr"):
        finetune(reviews(), text="review", label="stars", steps=12, evaluate_every=3, lr=0.5,
                 precision="own", out=whole, resume=True, **SMALL)  # fmt: skip
    with pytest.raises(ConfigError, match="data"):
        finetune(reviews(72), text="review", label="stars", steps=12, evaluate_every=3,
                 precision="own", out=whole, resume=True, **SMALL)  # fmt: skip
    monkeypatch.delitem(presets._PRESETS, "own")  # the user's file says something else by now
    changed = get_precision("fp16", rules=["**/mlp=r=fp8"])
    register_preset(dataclasses.replace(changed, name="own"))
    with pytest.raises(ConfigError, match="^resume: policies.*mlp"):
        run("whole")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tsak": "classify"}, "finetune: no setting 'tsak'; did you mean task"),
        ({"task": "clasify"}, "task: unknown 'clasify'"),
        ({"metric": "acc"}, "metric: no score 'acc'; known: accuracy, "),
        ({"text": "revew"}, "no column 'revew' \\(there: review, stars\\)"),
        ({"epochs": float("nan")}, "epochs=nan"),
        ({"batch": 0}, "batch=0: expected a whole number from 1 on"),
        ({"held_out": 1.0}, "held_out=1: nothing would judge the run"),
        ({"precision": "bf61"}, "bf61"),
        ({"model": "no/such/folder"}, "no such file or folder"),
        ({"second": "stars", "label": "", "task": "tag"}, "second='stars': tag has none"),
        ({"mesh": "data=64"}, "data=64"),
        ({"optimizer": "adma"}, "adma"),
        ({"label": "review"}, "names one twice"),
        ({"task": "seq2seq", "model": "some"}, "seq2seq trains a new model"),
        ({"balanced": True, "task": "tag", "text": "", "label": ""}, "balanced=True: tag has none"),
        ({"balanced": True, "class_weights": True}, "rare classes would count twice"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    own = dict(text="review", label="stars", steps=1, out=tmp_path / "run", **SMALL) | settings
    with pytest.raises(ConfigError, match=said) as error:
        finetune(reviews(16), **own)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
