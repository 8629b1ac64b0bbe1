"""What a tired researcher types wrong: one line on stderr, status 2, and nothing is written.

Most commands run in this process, by the same `launch.command` that the scripts call; some run as
processes of their own. Every message must hold the field, the value (or path) and the remedy.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest

from mpjax.train.report.metrics_writer import read_metrics

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("fast_compile")]
ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "layers": "1", "width": "16", "heads": "2", "seq": "16", "batch": "8", "steps": "4",
    "warmup": "1", "eval-batches": "1", "data": "{files}/text.txt", "out": "{out}",
}  # fmt: skip
BASE = {
    "train_lm": TINY | {"sample": "0", "save-every": "2"},
    "sweep": TINY | {"seeds": "1", "precision": "fp32", "lr": "1e-3"},
    "compare_precisions": TINY | {"seeds": "1"},
    "compress_gradients": TINY | {"seeds": "1", "lr": "1e-3", "compression": "int8"},
    "generate": {"run": "{run}", "tokens": "4", "prompt": "line"},
    "bench_step": {},
    "stages": {"plan": "{files}/plan.toml", "out": "{out}"},
    "augment": {
        "data": "{files}/labels.tsv", "synonyms": "{files}/words.txt", "texts": "20", "seeds": "1",
        "steps": "4", "layers": "1", "width": "16", "heads": "2", "vocabulary": "90",
        "lengths": "16", "augment": "eda", "out": "{out}",
    },
    "recommend": {
        "data": "{files}/likes.tsv", "steps": "4", "lengths": "16", "seeds": "1",
        "precision": "fp32", "out": "{out}",
    },
    "finetune_tagger": {
        "data": "{files}/tags.txt", "task": "chinese", "checkpoint": "none", "out": "{out}",
    },
}  # fmt: skip
PLAN = """
[model]
family = "decoder"
size = "tiny"
layers = 1
width = 16
heads = 2

[[stage]]
name = "pretrain"
kind = "language"
data = "{files}/text.txt"
tokenizer = "bytes"
steps = 2
seq = 16
batch = 4
"""


class Done(NamedTuple):
    code: Any
    out: str
    err: str


def arguments(script: str, typed: str, **places: Any) -> list[str]:
    """A small command that works, with what was typed in place of its own flags."""
    words = shlex.split(typed)
    flags = {f"--{key}": value for key, value in BASE[script].items() if f"--{key}" not in words}
    line = [word for pair in flags.items() for word in pair] + words
    return [fill(word, places) for word in line]


def fill(word: str, places: dict[str, Any]) -> str:
    for name, value in places.items():
        word = word.replace("{" + name + "}", str(value))
    return word


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder with its content; None is a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="session")
def scripts():
    """The experiments as modules; what their import and `command` change is put back."""
    level = logging.getLogger("mpjax").level
    with (
        mock.patch.dict(os.environ),
        mock.patch.object(sys, "path", [*sys.path]),
        mock.patch.object(sys, "unraisablehook"),
    ):
        sys.path.insert(0, str(ROOT / "experiments"))
        names = ("common.launch", *BASE)
        found = {name.rpartition(".")[2]: importlib.import_module(name) for name in names}
        yield SimpleNamespace(**found)
    logging.getLogger("mpjax").setLevel(level)


@pytest.fixture(scope="session")
def command(scripts):
    """Runs an experiment's command line in this process, without the optional packages."""

    def run(script: str, args: list[str]) -> Done:
        module, code = getattr(scripts, script), 0
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(sys, "argv", [f"{script}.py", *args]),
            mock.patch.dict(sys.modules, {"wandb": None, "datasets": None}),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                scripts.launch.command(module.main, module.Config)
            except SystemExit as ended:
                code = ended.code
        return Done(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Texts, tables and tokenizers; good and bad ones."""
    root = tmp_path_factory.mktemp("files")
    text = "".join(f"line {i}: the quick brown fox and number {i * i}\n" for i in range(400))
    (root / "broken_recipes.py").write_text("# of mine\nregister(1)\n")
    (root / "my_recipes.py").write_text(MINE)
    content = {
        "text.txt": text,
        "likes.tsv": "".join(f"u{i // 4}\tfilm {i % 7}\t{i % 4}\n" for i in range(40)),
        "late.tsv": "a\tx\tnoon\n",
        "once.tsv": "a\tx\t1\na\ty\t2\n",
        "tags.txt": "".join(f"c{i}\tn\nd\tB-n\n\n" for i in range(40)),
        "empty.txt": "",
        "labels.tsv": "".join(f"{'ab'[i % 2]}\tword {i} is good\n" for i in range(60)),
        "words.txt": "good: fine, great\n",
        "short.txt": "ab\ncd\n",
        "one.txt": "x",
        "rows.jsonl": '{"text": "hello"}\n{"text": "world"}\n',
        "numbers.jsonl": '{"text": 3}\n',
        "broken.jsonl": '{"text": "a"}\n{oops\n',
        "broken.parquet": "PAR",
        "broken.json": '{"model"',
        "other.json": '{"a": 1}',
        "odd.json": '{"model": {"type": "Nope"}}',
    }
    plan = PLAN.replace("{files}", str(root))
    content |= {
        "plan.toml": plan,
        "needs.toml": f'{plan}[[stage]]\nname = "b"\nkind = "quantise"\nfrom = "pretrian"\n',
        "steps.toml": plan.replace("steps = 2", "stpes = 2"),
        "wide.toml": plan + f'[[stage]]\nname = "b"\n{plan[plan.index("kind"):]}'.replace(
            'tokenizer = "bytes"', "model = { width = 32 }"
        ),
    }  # fmt: skip
    for name, text in content.items():
        (root / name).write_text(text)
    (root / "binary.bin").write_bytes(bytes(range(256)) * 10)
    (root / "emptydir").mkdir()
    return root


@pytest.fixture(scope="module")  # not before `fast_compile`, which a resumed run must have too
def run(command, files, tmp_path_factory, fast_compile):
    """A run of four steps with checkpoints at 2 and 4; the control of all that follows."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = command("train_lm", arguments("train_lm", "", files=files, out=out))
    assert done.code == 0, done.err
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["2", "4"]
    return out


def require_one_line(done: Done, parts: tuple[str, ...]) -> None:
    lines = done.err.splitlines()
    assert done.code == 2, done
    assert len(lines) == 1 and lines[0].startswith("error: "), done.err
    assert "Traceback" not in done.out + done.err
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"


LONG = "a prompt of more than sixteen tokens"
# kind, script, what is typed, then parts of the message: the field, the value, the remedy.
CASES = [
    ("unknown preset", "train_lm", "--precision bff16", "precision", "'bff16'", "mean bf16"),
    ("unknown preset", "train_lm", "--precision FP16", "precision", "'FP16'", "presets: fp32"),
    ("unknown preset", "train_lm", "--precision O1", "precision", "O1", "O2 has"),
    ("unknown preset", "train_lm", "--precision ''", "precision", "empty", "presets: fp32"),
    ("unknown preset", "sweep", "--precision fp32 bff16", "precision", "'bff16'", "mean bf16"),
    ("unknown preset", "sweep", "--precision", "precision", "empty", "give at least one"),
    ("sweep", "sweep", "--sweep layers", "sweep: 'layers'", "write NAME=VALUE,VALUE"),
    ("sweep", "sweep", "--sweep layer=2,4", "unknown setting 'layer'", "did you mean layers"),
    ("sweep", "sweep", "--sweep layers=2,two", "layers='two'", "whole number"),
    ("sweep", "sweep", "--sweep layers=2,2", "layers=2,2", "name each once"),
    ("sweep", "sweep", "--sweep layers=2 --sweep layers=4", "layers stands twice", "all its"),
    ("sweep", "sweep", "--sweep lr=1e-3 --lr 2e-3", "lr=(0.001,)", "--lr (0.002,)", "one of them"),
    ("sweep", "sweep", "--sweep steps=0,4", "steps: 0", "above 0"),
    ("sweep", "sweep", "--sweep heads=1,3", "heads=3", "change one"),
    ("sweep", "sweep", "--sweep seeds=1,2", "unknown setting 'seeds'", "known: data"),
    ("sweep", "sweep", "--sweep precision=fp32,bff16", "('fp32', 'bff16')", "one of them"),
    ("mesh", "sweep", "--mesh data=3", "mesh: data=3", "devices"),
    ("import", "sweep", "--import {files}/none.py", "import: ", "none.py is no file", "my_recipes"),
    ("import", "train_lm", "--import", "--import: no file", "write --import my_recipes.py"),
    ("import", "sweep", "--import {files}/broken_recipes.py", "broken_recipes.py, line 2",
     "NameError", "mend the file"),
    ("malformed policy", "train_lm", "--precision p=f32,q=bf16", "precision", "'q'", "write p="),
    ("malformed policy", "train_lm", "--precision p=f32,p=bf16", "'p'", "twice", "keep one"),
    ("malformed policy", "train_lm", "--precision 'bf16 foo=3'", "'foo=3'", "KEY=VALUE"),
    ("malformed policy", "train_lm", "--precision '{oops'", "precision", "JSON", "to_json"),
    ("malformed policy", "train_lm", """--precision '{"name": "x"}'""", "JSON", "moments", "rules"),
    ("unknown dtype", "train_lm", "--precision c=bf17", "precision: c", "'bf17'", "mean bf16"),
    ("unknown dtype", "train_lm", "--rule '**/mlp=fp33'", "rule", "'fp33'", "mean fp32"),
    ("unknown dtype", "train_lm", "--gradient-dtype int8", "gradient_dtype", "'int8'", "float32"),
    ("unknown dtype", "train_lm", "--gradient-dtype fp64", "float64", "JAX_ENABLE_X64=1"),
    ("residuals", "train_lm", "--residuals e4m4", "residuals: ", "'e4m4'", "did you mean e4m3"),
    ("residuals", "train_lm", "--residuals bf16@8", "bf16 has no blocks", "leave @8 out"),
    ("compression", "train_lm", "--compression int9", "compression: ", "'int9'", "int8@256"),
    ("compression", "train_lm", "--compression int8@12", "a block of 12", "write int8@8"),
    ("compression", "train_lm", "--compression topk", "'topk'", "topk:0.01"),
    ("compression", "train_lm", "--compression int8 --mesh fsdp=8", "the axis 'data' has 1",
     "at least 2"),
    ("diloco", "train_lm", "--diloco often", "diloco: ", "'often'", "write every=20"),
    ("diloco", "train_lm", "--diloco every=2 --mesh fsdp=8", "has 1", "leave diloco out"),
    ("diloco", "train_lm", "--diloco every=2 --precision-schedule late:fp8:bf16:.5", "diloco",
     "leave schedule out"),
    ("compression", "compress_gradients", "--compression none in8", "'in8'", "did you mean int8"),
    ("compression", "compress_gradients", "--compression none none", "name each arm once"),
    ("compression", "compress_gradients", "--tuned-on 3", "tuned_on: 3 of 1 seeds", "at most"),
    ("compression", "compress_gradients", "--optimizer one-bit-adam", "one-bit-adam", "leave"),
    ("compression", "compress_gradients", "--mesh fsdp=8", "the axis 'data' has 1", "at least 2"),
    ("rule matches nothing", "train_lm", "--rule '**/nrom*=fp32'", "**/nrom*", "near", "**/norm"),
    ("rule matches nothing", "train_lm", "--rule 'decoder/heed=bf16'", "heed", "near", "head"),
    ("malformed rule", "train_lm", "--rule '**/norm*'", "rule", "'**/norm*'", "PATTERN=VALUE"),
    ("malformed rule", "train_lm", "--rule '=fp32'", "rule", "'=fp32'", "PATTERN=VALUE"),
    ("malformed rule", "train_lm", "--rule 'a b=fp32'", "rule", "'a b'", "PATTERN=VALUE"),
    ("shadowed rule", "train_lm", "--rule '**=fp32' --rule '**/mlp=bf16'", "**/mlp", "move it up"),
    ("path not covered", "train_lm", "--precision 'mine base:**/mlp=fp32'", "decoder/embed",
     "'mine'", "add '**=POLICY'"),
    ("path not covered", "train_lm", "--eval-precision 'mine base:'", "decoder/embed", "'mine'",
     "add '**=POLICY'"),
    ("eval precision", "train_lm", "--eval-precision fp23", "eval_precision", "'fp23'", "fp32"),
    ("loss scale", "train_lm", "--loss-scale dynamci", "loss scale", "'dynamci'", "dynamic:init"),
    ("loss scale", "train_lm", "--loss-scale static", "loss scale", "static", "static:1024"),
    ("loss scale", "train_lm", "--loss-scale static:0", "loss scale", "init=0.0", "give one"),
    ("loss scale", "train_lm", "--loss-scale static:big", "loss scale", "'big'", "init=1024"),
    ("loss scale", "train_lm", "--loss-scale dynamic:grow=2", "'grow=2'", "KEY in init growth"),
    ("loss scale", "train_lm", "--loss-scale dynamic:init=.5", "init=0.5", "min=1", "move init"),
    ("loss scale", "train_lm", "--loss-scale dynamic:growth=.5", "growth=0.5", "growth=2"),
    ("loss scale", "train_lm", "--loss-scale dynamic:interval=2.5", "interval=2.5", "round it"),
    ("loss scale", "train_lm", "--loss-scale dynamic:init=nan", "init=nan", "finite", "give one"),
    ("loss scale", "train_lm", "--loss-scale static:1e60", "init=1e+60", "float32", "inside"),
    ("loss scale", "compare_precisions", "--loss-scale dynamci", "'dynamci'", "dynamic:init"),
    ("update", "train_lm", "--update nearst", "update", "'nearst'", "nearest"),
    ("update", "train_lm", "--update nearest", "update", "'nearest'", "p=bf16"),
    ("update", "train_lm", "--precision p=bf16,c=bf16,o=bf16", "update", "bf16", "update=master"),
    ("update", "train_lm", "--precision pure-bf16 --update none", "bf16", "update=master"),
    ("moments", "train_lm", "--moments fp17", "moments", "'fp17'", "mean fp16"),
    ("moments", "train_lm", "--moments thrid=bf16", "moments", "'thrid=bf16'", "second=FORMAT"),
    ("moments", "train_lm", "--moments second=bf16 --optimizer sgd", "moments", "second",
     "moments=f32"),
    ("mesh", "train_lm", "--mesh dta=8", "mesh", "'dta'", "known: data fsdp tensor"),
    ("mesh", "train_lm", "--mesh data=3", "mesh", "needs 3 devices, there are 8", "change"),
    ("mesh", "train_lm", "--mesh data=two", "mesh", "'two'", "write data=2"),
    ("mesh", "train_lm", "--mesh data=8,data=8", "mesh", "'data' stands twice", "keep one"),
    ("batch does not divide", "train_lm", "--batch 12", "batch", "12", "take 8"),
    ("batch does not divide", "train_lm", "--accumulate 3", "batch: 8", "24", "take 24"),
    ("model", "train_lm", "--model gpt3", "model", "'gpt3'", "did you mean gpt2"),
    ("model", "sweep", "--model gpt3", "model", "'gpt3'", "did you mean gpt2"),
    ("sizes", "train_lm", "--width 15", "width=15", "heads=2", "change one"),
    ("sizes", "train_lm", "--heads 4 --kv-heads 3", "heads=4", "kv_heads=3", "change one"),
    ("sizes", "train_lm", "--width 6", "rotary", "width/heads=3", "position=learned"),
    ("sizes", "train_lm", "--layers 0", "model", "layers=0", "raise it"),
    ("sizes", "train_lm", "--norm batch", "norm='batch'", "known: layer rms"),
    ("sizes", "train_lm", "--remat all", "remat='all'", "known: none full"),
    ("sizes", "train_lm", "--dropout 1.5", "dropout=1.5", "lower it"),
    ("sizes", "compare_precisions", "--heads 3", "width=16", "heads=3", "change one"),
    ("vocabulary", "train_lm", "--vocabulary 100", "vocabulary: 100", "256", "make it larger"),
    ("vocabulary", "train_lm", "--tokenizer bpe:100", "'bpe:100'", "too small", "at least 257"),
    ("tokenizer", "train_lm", "--tokenizer bpe:4k", "tokenizer", "'bpe:4k'", "bpe:4096"),
    ("tokenizer", "train_lm", "--tokenizer {files}/no.json", "tokenizer", "no.json", "a file"),
    ("tokenizer", "train_lm", "--tokenizer {files}/broken.json", "broken.json", "a tokenizer.json"),
    ("tokenizer", "train_lm", "--tokenizer {files}/other.json", "other.json", "a tokenizer.json"),
    ("tokenizer", "train_lm", "--tokenizer {files}/odd.json", "odd.json", "save it again"),
    ("tokenizer", "train_lm", "--tokenizer {files}/emptydir", "emptydir", "name a tokenizer.json"),
    ("data", "train_lm", "--data {files}/none.txt", "data", "none.txt", "expected stdlib"),
    ("data", "train_lm", "--data ''", "data", "''", "expected stdlib"),
    ("data", "train_lm", "--data {files}/empty.txt", "empty.txt", "no text", "name a source"),
    ("data", "train_lm", "--data {files}/binary.bin", "binary.bin", "convert it to UTF-8"),
    ("schedule of precision", "train_lm", "--precision-schedule lat:fp8:bf16", "'lat'", "late"),
    ("schedule of precision", "train_lm", "--precision-schedule late:fp8:bff16", "'bff16'", "bf16"),
    ("schedule of precision", "train_lm", "--precision-schedule late:fp8:bf16:2", "2.0", "0 and 1"),
    ("schedule of precision", "train_lm", "--precision-schedule late:fp8:bf16:.001", "is 0 steps"),
    ("schedule of precision", "train_lm", "--precision-schedule late:pure-bf16:bf16", "update"),
    ("schedule of precision", "train_lm", "--precision-schedule late:fp8:bf16 --precision fp16",
     "--precision fp16", "leave one of them out"),
    ("schedule of precision", "train_lm", "--precision-schedule dynamic:fp16:fp32 --patience 9",
     "patience=9", "raise patience to 40"),
    ("schedule of precision", "train_lm", "--precision-schedule mixed:fp8:nrom=fp32", "**/nrom*",
     "**/norm"),
    ("schedule of precision", "train_lm", "--precision-schedule fixed:bf16:fp32"
     " --eval-precision bf16", "eval_precision: bf16", "judged in fp32"),
    ("data", "train_lm", "--data {files}/emptydir", "emptydir", "no text", "name a source"),
    ("data", "train_lm", "--data {files}/one.txt", "one.txt", "1 character", "a longer text"),
    ("data", "train_lm", "--data {files}/broken.parquet", "broken.parquet", "write it again"),
    ("data", "train_lm", "--data hf:some/thing", "hf:some/thing", "pip install", "[hub]'"),
    ("data", "sweep", "--data {files}/none.txt", "data", "none.txt", "expected stdlib"),
    ("data", "compare_precisions", "--data {files}/none.txt", "none.txt", "expected stdlib"),
    ("column", "train_lm", "--data {files}/rows.jsonl:body", "'body'", "there: text", "SOURCE:"),
    ("column", "train_lm", "--data {files}/numbers.jsonl", "numbers.jsonl:1", "int", "FILE:column"),
    ("column", "train_lm", "--data {files}/broken.jsonl", "line 2", "one JSON object a line"),
    ("column", "train_lm", "--data {files}/text.txt:body", "'body'", "drop the column"),
    ("text too short", "train_lm", "--data {files}/short.txt", "seq=16", "4 tokens", "lower seq"),
    ("text too short", "train_lm", "--seq 100000", "seq=100000", "longer than", "lower seq"),
    ("text too short", "train_lm", "--batch 4096", "batch=4096", "held-out", "lower batch"),
    ("text too short", "sweep", "--batch 4096", "batch=4096", "held-out", "lower batch"),
    ("context", "train_lm", "--context 8", "context: 8", "--seq 16", "raise it"),
    ("number", "train_lm", "--steps 0", "steps: 0", "above 0"),
    ("number", "train_lm", "--steps -3", "steps: -3", "above 0"),
    ("number", "train_lm", "--batch 0", "batch: 0", "above 0"),
    ("number", "train_lm", "--seq 0", "seq: 0", "above 0"),
    ("number", "train_lm", "--accumulate 0", "accumulate: 0", "above 0"),
    ("number", "train_lm", "--lr 0", "lr: 0.0", "above 0"),
    ("number", "train_lm", "--lr -1e-3", "lr: -0.001", "above 0"),
    ("number", "train_lm", "--clip -1", "clip: -1.0", "0 or above"),
    ("number", "train_lm", "--weight-decay -1", "weight_decay: -1.0", "0 or above"),
    ("number", "train_lm", "--eval-batches 0", "eval_batches: 0", "above 0"),
    ("number", "train_lm", "--eval-every -1", "eval_every: -1", "0 or above"),
    ("number", "train_lm", "--patience 0", "patience: 0", "above 0"),
    ("number", "train_lm", "--keep 0", "keep: 0", "above 0"),
    ("number", "train_lm", "--seed -1", "seed: -1", "0 or above"),
    ("number", "train_lm", "--seed 99999999999", "seed: 99999999999", "at most 2147483647"),
    ("number", "train_lm", "--held-out 0", "held_out=0.0", "above 0 and below 1"),
    ("number", "train_lm", "--held-out 1.5", "held_out=1.5", "above 0 and below 1"),
    ("number", "train_lm", "--kv-heads -1", "kv_heads=-1", "not be negative"),
    ("number", "sweep", "--seeds 0", "seeds: 0", "above 0"),
    ("number", "sweep", "--lr 1e-3 -1", "lr: -1.0", "above 0"),
    ("number", "compare_precisions", "--stress 400", "stress", "400", "give 0 .. 100"),
    ("number", "bench_step", "--rounds 0", "rounds: 0", "above 0"),
    ("not finite", "train_lm", "--lr nan", "lr: nan", "finite number above 0"),
    ("not finite", "train_lm", "--lr inf", "lr: inf", "finite number above 0"),
    ("not finite", "train_lm", "--clip nan", "clip: nan", "finite number"),
    ("not finite", "train_lm", "--held-out nan", "held_out=nan", "below 1"),
    ("not finite", "train_lm", "--weight-decay inf", "weight_decay: inf", "finite number"),
    ("not finite", "train_lm", "--logit-cap nan", "logit_cap=nan", "give a finite number"),
    ("not finite", "train_lm", "--z-loss inf", "z_loss=inf", "give a finite number"),
    ("not finite", "train_lm", "--epsilon nan", "epsilon=nan", "give a finite number"),
    ("not finite", "sweep", "--lr nan", "lr: nan", "finite number above 0"),
    ("warmup", "train_lm", "--warmup 4", "warmup: 4", "0..3", "change one"),
    ("warmup", "sweep", "--warmup 9", "warmup: 9", "0..3", "change one"),
    ("optimizer", "train_lm", "--optimizer adam", "optimizer", "'adam'", "did you mean adamw"),
    ("optimizer", "sweep", "--optimizer adam", "optimizer", "'adam'", "did you mean adamw"),
    ("schedule", "train_lm", "--schedule cosin", "schedule", "'cosin'", "did you mean cosine"),
    ("nothing to resume", "train_lm", "--resume latest", "resume", "no checkpoint", "leave"),
    ("nothing to resume", "train_lm", "--resume 5", "resume", "no checkpoint", "leave"),
    ("nothing to start from", "train_lm", "--init-from {files}", "init_from", "{files}",
     "give a run's folder"),
    ("out", "train_lm", "--out {files}/text.txt", "out", "text.txt", "choose another --out"),
    ("out", "train_lm", "--out {files}/text.txt/run", "out", "text.txt/run", "another --out"),
    ("out", "train_lm", "--out /proc/run", "out", "/proc/run", "choose another --out"),
    ("out", "sweep", "--out {files}/text.txt", "out", "text.txt", "choose another --out"),
    ("prompt", "train_lm", f"--position learned --context 16 --sample 5 --prompt '{LONG}'",
     "prompt", "36 tokens", "shorten it"),
    ("prompt", "train_lm", "--sample 5 --prompt ''", "prompt", "''", "give some text"),
    ("wandb", "train_lm", "--wandb mine", "wandb", "not installed", "pip install"),
    ("plan", "stages", "--plan {files}/none.toml", "plan", "none.toml", "experiments/plans/bert"),
    ("plan", "stages", "--plan {files}/text.txt", "plan", "text.txt", "no TOML", "mend the file"),
    ("plan", "stages", "--plan {files}/needs.toml", "stage 'b'", "from = 'pretrian'",
     "did you mean pretrain"),
    ("plan", "stages", "--plan {files}/steps.toml", "'pretrain'", "'stpes'", "did you mean steps"),
    ("plan", "stages", "--plan {files}/wide.toml", "stage 'b'", "shape (256, 16)", "(256, 32)",
     "begin it anew"),
    ("plan", "stages", "--save-every 0", "save_every: 0", "above 0"),
    ("plan", "stages", "--stage pretrain", "stage: 'pretrain'", "--export FOLDER"),
    ("plan", "stages", "--export {out}x --stage pretran", "'pretran' is no stage", "pretrain"),
    ("plan", "stages", "--export {files}", "{files}: export", "new or empty folder"),
    ("no run", "generate", "--run {files}", "run", "{files}", "give a folder of train_lm.py"),
    ("no run", "generate", "--run {files}/text.txt", "text.txt", "give a folder of train_lm.py"),
    ("augmentation", "augment", "--augment swpa", "augment", "'swpa'", "did you mean swap"),
    ("augmentation", "augment", "--augment swap swap", "augment", "name each arm once"),
    ("augmentation", "augment", "--augment", "augment", "empty", "give at least one"),
    ("augmentation", "augment", "--rate 1", "rate: 1.0", "below 1, as 0.1"),
    ("augmentation", "augment", "--rate -0.1", "rate: -0.1", "0 or above"),
    ("augmentation", "augment", "--share 1.5", "share: 1.5", "above 1", "as 0.5"),
    ("augmentation", "augment", "--alpha 0", "alpha: 0.0", "above 0"),
    ("augmentation", "augment", "--texts 999", "texts: 999", "lower it"),
    ("augmentation", "augment", "--texts 1", "texts: 1", "of one class", "give more"),
    ("augmentation", "augment", "--synonyms {files}/empty.txt", "empty.txt", "word: synonym"),
    ("augmentation", "augment", "--synonyms {files}/text.txt", "line 1", "word: synonym"),
    ("augmentation", "augment", "--synonyms wordnte", "wordnte", "no such file", "word: synonym"),
    ("recommender", "recommend", "--data movielen", "data", "'movielen'", "expected movielens"),
    ("recommender", "recommend", "--data {files}/late.tsv", "late.tsv", "'noon'", "give one"),
    ("recommender", "recommend", "--data {files}/once.tsv", "no user", "three", "more data"),
    ("recommender", "recommend", "--data {files}/tags.txt", "tags.txt", "user<TAB>text<TAB>time"),
    ("recommender", "recommend", "--kind triplet", "--kind", "triplet", "softmax"),
    ("recommender", "recommend", "--temperature 0", "temperature: 0.0", "above 0"),
    ("recommender", "recommend", "--negatives 0", "negatives: 0", "above 0"),
    ("recommender", "recommend", "--history -1", "history: -1", "above 0"),
    ("recommender", "recommend", "--item-length 3", "item_length: 3", "at least 4"),
    ("recommender", "recommend", "--precision fp32 bf61", "precision", "'bf61'", "mean bf16"),
    ("tags of characters", "finetune_tagger", "", "tags.txt", "tag 'n'", "--task pos"),
    ("command line", "train_lm", "--stesp 3", "--stesp", "see --steps INT"),
    ("command line", "train_lm", "--lr fast", "--lr", "'fast'", "see --lr FLOAT"),
    ("command line", "train_lm", "--batch 2.5", "--batch", "'2.5'", "see --batch INT"),
    ("command line", "train_lm", "--tied maybe", "--tied", "'maybe'", "'True'"),
    ("command line", "train_lm", "--keep", "--keep", "Missing value", "--help"),
    ("command line", "train_lm", "text.txt", "text.txt", "Unrecognized", "--help"),
    ("command line", "sweep", "--learning-rate 3", "--learning-rate", "--help"),
    ("command line", "bench_step", "--layer 3", "--layer", "see --layers INT"),
]  # fmt: skip
KINDS = {kind for kind, *_ in CASES}


def test_there_are_as_many_cases_and_kinds_as_promised():
    assert len(CASES) >= 50 and len(KINDS) >= 14
    assert len({(script, typed) for _, script, typed, *_ in CASES}) == len(CASES)


@pytest.mark.parametrize(
    ("script", "typed", "parts"),
    [pytest.param(s, typed, parts, id=f"{kind}: {s} {typed}") for kind, s, typed, *parts in CASES],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    command, files, tmp_path, script, typed, parts
):
    out, before = tmp_path / "run", snapshot(files)
    done = command(script, arguments(script, typed, files=files, out=out, run=tmp_path))
    require_one_line(done, tuple(fill(part, {"files": files}) for part in parts))
    assert not done.out, "nothing is shown before everything has been checked"
    assert not out.exists() and snapshot(files) == before


# What is typed, at a folder that holds a run of 4 steps with checkpoints at 2 and 4.
RESUMED = [
    ("", "out", "checkpoints at [2, 4]", "--resume latest", "another --out"),
    ("--resume 3", "resume", "'3'", "2 4"),
    ("--resume newest", "resume", "'newest'", "latest-good"),
    ("--resume latest --lr 2e-3", "lr was 0.001", "is 0.002", "give the saved settings"),
    ("--resume latest --seed 1", "seed was 0", "is 1", "give the saved settings"),
    ("--resume latest --batch 16", "batch was 8", "is 16", "give the saved settings"),
    ("--resume latest --precision fp32", 'precision was "bf16"', '"fp32"', "another --out"),
    ("--resume latest --rule '**/mlp=fp32'", "rule was []", "**/mlp", "another --out"),
    ("--resume latest --loss-scale static:8", "loss_scale was null", "static:8", "another --out"),
    (
        "--resume latest --precision-schedule late:bf16:fp32",
        "precision_schedule was (not set)",
        "late:bf16:fp32",
        "another --out",
    ),
    ("--resume latest --width 32", "shape.width was 16", "is 32", "another --out"),
    ("--resume latest --dropout 0.1", "shape.dropout was", "is 0.1", "another --out"),
    ("--resume latest --optimizer sgd", 'optimizer was "adamw"', '"sgd"', "another --out"),
    (
        "--resume latest --steps 8",
        "steps: 8 now, 4 at the save",
        "--schedule cosine",
        "--steps 4",
        "--init-from",
    ),
    ("--resume latest --data {files}/rows.jsonl --held-out .5", "data was", "held_out was 0.05"),
    ("--resume latest --tokenizer bpe:300", 'tokenizer was "bytes"', "bpe:300", "another --out"),
    ("--resume latest --pack", "pack was (not set)", "is true now", "another --out"),
    ("--resume latest --accumulate 8 --batch 64", "accumulate was 1", "is 8", "another --out"),
]


@pytest.mark.parametrize(("typed", "parts"), [(typed, parts) for typed, *parts in RESUMED])
def test_a_wrong_resume_leaves_the_run_byte_identical(command, files, run, typed, parts):
    before = snapshot(run)
    done = command("train_lm", arguments("train_lm", typed, files=files, out=run))
    require_one_line(done, tuple(parts))
    assert snapshot(run) == before and len(before) > 20


def test_changed_text_under_the_same_name_is_refused(command, files, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(files, tmp_path / "files")
    text = tmp_path / "files" / "text.txt"
    args = arguments("train_lm", "--resume latest", files=files, out=tmp_path / "run")
    assert command("train_lm", args).code == 0, "the control: the text is the same"
    before = snapshot(tmp_path / "run")
    original = (files / "text.txt").read_text()
    try:
        (files / "text.txt").write_text(original.replace("quick", "brisk"))
        done = command("train_lm", args)
    finally:
        shutil.copy(text, files / "text.txt")
    require_one_line(done, ("data.sha256 was", "another --out"))
    assert snapshot(tmp_path / "run") == before


def test_a_changed_environment_is_named(command, files, run):
    import jax

    before, precision = snapshot(run), jax.config.jax_default_matmul_precision
    jax.config.update("jax_default_matmul_precision", "float32")
    try:
        done = command("train_lm", arguments("train_lm", "--resume latest", files=files, out=run))
    finally:
        jax.config.update("jax_default_matmul_precision", precision)
    require_one_line(
        done, ("jax_default_matmul_precision was null", '"float32" now', "--init-from")
    )
    assert snapshot(run) == before


GENERATE = [
    ("--step 3", "step", "at 3", "[2, 4]"),
    ("--prompt ''", "prompt", "''", "give some text"),
    ("--tokens 0", "tokens: 0", "above 0"),
    ("--temperature -1", "temperature: -1.0", "0 or above"),
    ("--temperature nan", "temperature: nan", "finite number"),
    ("--top-k 999", "top_k: 999", "256 tokens", "lower it"),
    ("--precision bff16", "precision", "'bff16'", "did you mean bf16"),
    ("--precision 'bf16 rule:**/nrom=fp32'", "**/nrom", "near misses", "**/norm"),
]


@pytest.mark.parametrize(("typed", "parts"), [(typed, parts) for typed, *parts in GENERATE])
def test_a_wrong_sample_is_one_line(command, run, typed, parts):
    before = snapshot(run)
    done = command("generate", arguments("generate", typed, run=run))
    require_one_line(done, tuple(parts))
    assert not done.out and snapshot(run) == before


def test_the_same_commands_without_a_mistake_succeed(command, files, run, tmp_path):
    done = command("generate", arguments("generate", "", run=run))
    assert done.code == 0 and done.out.startswith("line") and not done.err
    done = command("sweep", arguments("sweep", "", files=files, out=tmp_path / "sweep"))
    assert done.code == 0 and (tmp_path / "sweep" / "report.md").is_file()
    assert "Traceback" not in done.err


MINE = """
import dataclasses
from mpjax.precision import Operand, Recipe, get_precision, register_preset, register_recipe
pair = (Operand("e5m2"), Operand("e5m2"))
register_recipe(Recipe(name="sweep-test-e5m2", fprop=pair, dgrad=pair, wgrad=pair))
mine = get_precision("bf16", rules=["**/mlp=r=sweep-test-e5m2"])
register_preset(dataclasses.replace(mine, name="sweep-test-preset"))
"""


def test_recipes_of_ones_own_work_in_a_sweep_of_any_setting(command, files, tmp_path):
    out = tmp_path / "sweep"
    typed = (
        f"--import {files}/my_recipes.py --precision fp32 sweep-test-preset --lr 1e-3"
        " --sweep width=16,24 --sweep schedule=constant --sweep steps=3"
    )
    done = command("sweep", arguments("sweep", typed, files=files, out=out))
    assert done.code == 0, done.err
    pages = {p.parent.parent.name: json.loads(p.read_text()) for p in out.glob("*/*/manifest.json")}
    end = "_schedule=constant_steps=3"
    assert set(pages) == {
        f"{name}_lr=0.001_width={width}{end}"
        for name in ("fp32", "sweep-test-preset")
        for width in (16, 24)
    }
    page = pages[f"sweep-test-preset_lr=0.001_width=24{end}"]
    config = page["config"]
    assert (config["width"], config["schedule"], config["steps"]) == (24, "constant", 3)
    assert "sweep-test-e5m2" in page["precision_text"] and list(config["imports"]) == [
        "my_recipes.py"
    ]
    report = (out / "report.md").read_text()
    row = "| best: sweep-test-preset lr=0.001 width="
    assert row in report and "| best: fp32 lr=0.001 width=" in report
    # The file is a setting of the run: another one is not mixed in.
    page["config"]["imports"]["my_recipes.py"] = "another"
    folder = out / f"sweep-test-preset_lr=0.001_width=24{end}" / "seed0"
    (folder / "manifest.json").write_text(json.dumps(page))
    done = command("sweep", arguments("sweep", typed, files=files, out=out))
    require_one_line(done, ("imports.my_recipes.py was", "another --out"))


SWEEP = "--precision fp32 bf16 --lr 1e-3 --seeds 2"


def test_an_interrupted_sweep_goes_on_and_nothing_that_has_ended_is_trained_again(
    command, files, tmp_path
):
    out = tmp_path / "sweep"

    def again(typed: str) -> Done:
        return command("sweep", arguments("sweep", typed, files=files, out=out))

    assert again(SWEEP).code == 0
    runs = sorted(path.parent for path in out.glob("*/seed*/outcome.json"))
    assert len(runs) == 4
    first = {run: snapshot(run) for run in runs}
    table = (out / "report.md").read_text().split("Took")[0]
    torn = out / "bf16_lr=0.001" / "seed1"
    (torn / "outcome.json").unlink()  # as if it had been killed
    (torn / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "lo')
    done = again(SWEEP)
    assert done.code == 0 and done.err.count("has ended before") == 3
    assert {run: snapshot(run) for run in runs if run != torn} == {
        run: found for run, found in first.items() if run != torn
    }
    losses = [r["loss"] for r in read_metrics(torn / "metrics.jsonl") if "loss" in r]
    assert losses == [
        r["loss"]
        for line in first[torn]["metrics.jsonl"].decode().splitlines()
        if "loss" in (r := json.loads(line))
    ]
    cells = [line.split("|") for line in table.splitlines() if " lr=" in line]
    now = [line.split("|") for line in (out / "report.md").read_text().splitlines()]
    assert [c[1:5] for c in cells] == [c[1:5] for c in now if len(c) > 5 and " lr=" in c[1]]

    before = snapshot(out)
    require_one_line(
        again(f"{SWEEP} --steps 5"), ("steps was 4", "is 5", "another --out", "--fresh")
    )
    assert snapshot(out) == before
    strange = out / "fp32_lr=0.002" / "seed0"
    strange.mkdir(parents=True)
    (strange / "mine.txt").write_text("not a run's")
    done = again(f"{SWEEP.replace('1e-3', '2e-3')} --fresh")
    require_one_line(done, ("fp32_lr=0.002", "no run's folder", "another --out"))
    assert (strange / "mine.txt").read_text() == "not a run's"
    done = again(f"{SWEEP} --fresh")
    assert done.code == 0 and "has ended before" not in done.err
    assert snapshot(torn)["outcome.json"] == first[torn]["outcome.json"], "the same bits"


@pytest.mark.parametrize("script", ["train_lm", "sweep"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_short_run_needs_no_word_of_the_warm_up(command, files, tmp_path, script, steps):
    args = arguments(script, f"--steps {steps}", files=files, out=tmp_path / "run")
    place = args.index("--warmup")
    done = command(script, args[:place] + args[place + 2 :])
    assert done.code == 0, done.err
    (page,) = (json.loads(path.read_text()) for path in tmp_path.rglob("manifest.json"))
    assert page["config"]["warmup"] == steps // 2


def largest(step: Path) -> Path:
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_torn_checkpoint_is_named_and_the_one_before_it_is_taken(
    command, files, run, tmp_path, caplog
):
    shutil.copytree(run, tmp_path / "run")
    torn = largest(tmp_path / "run" / "checkpoints" / "4")
    torn.write_bytes(torn.read_bytes()[:-100])
    before = snapshot(tmp_path / "run")
    latest = arguments("train_lm", "--resume latest", files=files, out=tmp_path / "run")
    done = command("train_lm", latest)
    name = torn.relative_to(tmp_path / "run" / "checkpoints" / "4").as_posix()
    require_one_line(done, ("step 4 is damaged", name, "--resume latest-good takes step 2"))
    assert snapshot(tmp_path / "run") == before
    done = command("generate", arguments("generate", "--step 4", run=tmp_path / "run"))
    require_one_line(done, ("step 4 is damaged", name))
    done = command("train_lm", [word.replace("latest", "latest-good") for word in latest])
    assert done.code == 0 and "step 4 is damaged" in caplog.text
    assert largest(tmp_path / "run" / "checkpoints" / "4").stat().st_size > 0
    done = command("train_lm", latest)
    assert done.code == 0 and "nothing left to train" in done.out, "step 4 is whole again"


def test_damaged_logs_stop_no_resume(command, files, run, tmp_path, caplog):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    shutil.rmtree(out / "checkpoints" / "4")
    log = out / "metrics.jsonl"
    whole, damage = log.read_bytes(), b"\xff\xfe[[[\n[1]\n" + b"[" * 50_000
    log.write_bytes(whole + damage)
    (out / "manifest.json").write_text('{"config": {"lr"')
    done = command("train_lm", arguments("train_lm", "--resume latest", files=files, out=out))
    assert done.code == 0 and "Traceback" not in done.err, done.err
    assert (out / "metrics.jsonl.damaged").read_bytes() == damage
    assert (out / "manifest.json.damaged").is_file()
    losses = [
        [r["loss"] for r in read_metrics(p / "metrics.jsonl") if "loss" in r] for p in (run, out)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    said = [r.getMessage() for r in caplog.records if "moved to" in r.getMessage()]
    assert len(said) == 2, "one line each"


def test_a_run_whose_checkpoints_are_all_torn_is_one_line(command, files, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for step in (tmp_path / "run" / "checkpoints").iterdir():
        largest(step).unlink()
    before = snapshot(tmp_path / "run")
    for mode in ("latest", "latest-good", "2"):
        typed = f"--resume {mode}"
        done = command("train_lm", arguments("train_lm", typed, files=files, out=tmp_path / "run"))
        require_one_line(done, ("start without --resume",))
    assert snapshot(tmp_path / "run") == before


# As processes of their own: what the shell really sees.


def process(script: str, args: list[str], kilobytes: int = 0) -> Done:
    """Runs a script; a positive number is the largest file that the disk takes."""
    words, environment = [sys.executable, f"experiments/{script}.py", *args], dict(os.environ)
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"  # compiles in less time
    if kilobytes:
        words = ["sh", "-c", f'ulimit -f {2 * kilobytes}; exec "$@"', "sh", *words]
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # its warning is not ours
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=ROOT, timeout=300,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


SHELL = [
    ("train_lm", "--precision bff16", "precision", "'bff16'", "mean bf16"),
    ("train_lm", "--mesh data=3", "mesh", "needs 3 devices, there are 2", "change"),
    ("train_lm", "--data {files}/binary.bin", "binary.bin", "convert it to UTF-8"),
    ("train_lm", "--stesp 3", "--stesp", "see --steps INT"),
    ("generate", "--run {files}", "run", "{files}", "give a folder of train_lm.py"),
    ("bench_step", "--size smal", "model", "'smal'", "did you mean small"),
]


@pytest.mark.parametrize(("script", "typed", "parts"), [(s, t, parts) for s, t, *parts in SHELL])
def test_a_process_ends_with_status_2_and_one_line(files, tmp_path, script, typed, parts):
    done = process(script, arguments(script, typed, files=files, out=tmp_path / "run", run=files))
    require_one_line(done, tuple(fill(part, {"files": files}) for part in parts))
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_and_leaves_earlier_checkpoints_whole(files, tmp_path):
    out, steps = tmp_path / "run", tmp_path / "run" / "checkpoints"
    args = arguments("train_lm", "--schedule constant", files=files, out=out)
    done = process("train_lm", args)
    assert done.code == 0, done.err
    before = snapshot(steps)
    assert largest(steps).stat().st_size > 20_000, "or the limit below would not be felt"
    more = arguments(
        "train_lm", "--schedule constant --resume latest --steps 6", files=files, out=out
    )
    done = process("train_lm", more, kilobytes=20)
    last = done.err.splitlines()[-1]
    assert done.code == 2 and "Traceback" not in done.err, done.err
    assert last.startswith("error: ") and done.err.count("error: ") == 1
    for part in (str(steps), "no room for the checkpoint of step 6", "free some space"):
        assert part in last
    assert snapshot(steps) == before
