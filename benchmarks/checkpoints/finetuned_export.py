"""Fine-tuned runs, exported: transformers answers the same in another process.

Run:       python -m benchmarks.checkpoints.finetuned_export [--python PYTHON]
           where PYTHON has them: pip install torch transformers sentence-transformers
Expected:  classifier, pair classifier, tagger and language model: logits or probabilities within
           2e-5 of their size, the same names of labels and the same predictions on 200 texts. The
           mean of a run's tokens, and MiniLM's, in sentence-transformers: vectors within the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from benchmarks.common.page import write
from common.datasets.assets import fetch
from mpjax.finetuning import Tuned, finetune
from mpjax.finetuning.pretrained import tokenizer_of
from mpjax.markdown import table
from mpjax.models.hf import load_checkpoint, open_checkpoint, save_checkpoint
from mpjax.tasks import softmax
from mpjax.tasks.predictor import predictor
from tests.finetuning.test_finetune import SMALL, data_of

TASKS, TEXTS, BAR = ("classify", "pair", "tag", "lm"), 200, 2e-5
THEIRS = """
import json, sys
import torch, transformers
folder, kind, asked, out = sys.argv[1:]
made = {"tag": "TokenClassification", "lm": "CausalLM"}.get(kind, "SequenceClassification")
model = getattr(transformers, "AutoModelFor" + made).from_pretrained(folder).eval()
tokenizer, found = transformers.AutoTokenizer.from_pretrained(folder), []
with torch.no_grad():
    for one in json.load(open(asked)):
        parts = [one] if kind == "tag" or isinstance(one, str) else one
        batch = tokenizer(*parts, is_split_into_words=kind == "tag", return_tensors="pt")
        batch = {n: x for n, x in batch.items() if kind != "lm" or n != "token_type_ids"}
        logits = model(**batch).logits[0].tolist()
        found.append({"ids": batch["input_ids"][0].tolist(), "logits": logits})
labels = getattr(model.config, "id2label", {})
version = transformers.__version__
json.dump({"found": found, "labels": labels, "version": version}, open(out, "w"))
"""

VECTORS = """
import json, sys
import sentence_transformers
folder, asked, out = sys.argv[1:]
model = sentence_transformers.SentenceTransformer(folder, device="cpu")
found = model.encode(json.load(open(asked))).tolist()
json.dump({"found": found, "version": sentence_transformers.__version__}, open(out, "w"))
"""


def texts() -> list[str]:
    """Random texts of the data's words."""
    draw = random.Random(1)
    words = "the soup 12 was great awful stale fine tea".split()
    return [" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(TEXTS)]


def compared(run: Tuned, task: str, asked: Sequence[str], theirs: Any) -> tuple[float, int]:
    """The largest difference relative to the size, and how many answers are the same."""
    off, same = 0.0, 0
    labels = [theirs["labels"][str(i)] for i in range(len(theirs["labels"]))]
    seconds = ["so yes"] * len(asked) if task == "pair" else []
    answers = run.predict(asked, seconds) if task != "lm" else [{}] * len(asked)
    for text, answer, other in zip(asked, answers, theirs["found"], strict=True):
        logits = np.array(other["logits"])
        if task in ("classify", "pair"):
            probabilities = np.array(list(answer["probability"].values()))
            off = max(off, float(np.abs(softmax(logits) - probabilities).max()))
            same += labels[int(logits.argmax())] == answer["label"]
            continue
        if task == "tag":
            (example,), (starts,) = run.tokenizer.encode_words([text.split()], longest=32)
            ids, names = example["ids"], [labels[i] for i in logits[starts].argmax(-1)]
            same += names == answer["tags"] and ids.tolist() == other["ids"]
            ours = run.model.apply(run.params, {"ids": ids[None]})[0]["token"][0]
        else:
            ids = run.tokenizer.encode(text).astype(np.int32)
            ours = run.model.apply(run.params, ids[None])[0][0]
            equal = np.asarray(ours).argmax(-1) == logits.argmax(-1)
            same += bool(equal.all()) and ids.tolist() == other["ids"]
        scale = max(1.0, float(np.abs(logits).max()))
        off = max(off, float(np.abs(np.asarray(ours) - logits).max()) / scale)
    return off, same


def exported_encoder(folder: Path) -> tuple[Any, Any]:
    """An exported model and its weights, whose pooled output is the mean of the tokens."""
    return load_checkpoint(open_checkpoint(folder), head="none", pool="mean")


def minilm() -> tuple[Any, Any, Any]:
    """The model, weights and tokenizer of a checkpoint that sentence-transformers made."""
    checkpoint = open_checkpoint(fetch("minilm"))
    model, params = load_checkpoint(checkpoint, head="none", pool="mean", unused=["*pooler*"])
    return model, params, tokenizer_of(checkpoint, True)


def vectors_compared(
    model: Any, params: Any, tokenizer: Any, folder: Path, python: str
) -> tuple[float, str]:
    """The largest difference of vectors relative to their size, and the version that made them."""
    asked = [*texts()[1:], " ".join(texts())]  # and one that is as long as the model takes, or cut
    (folder / "asked.json").write_text(json.dumps(asked))
    paths = (folder / "exported", folder / "asked.json", folder / "vectors.json")
    subprocess.run([python, "-c", VECTORS, *map(str, paths)], check=True)
    found = json.loads(paths[-1].read_text())
    theirs = np.array(found["found"])
    limit = folder / "exported" / "sentence_bert_config.json"  # cuts texts, beside the context
    longest = model.config.context
    if limit.is_file():
        longest = json.loads(limit.read_text())["max_seq_length"]
    examples = tokenizer.encode(asked, longest=longest)
    ours = np.stack(predictor(model, "pooled", batch=32, lengths=(32, longest))(params, examples))
    if "Normalize" in (folder / "exported" / "modules.json").read_text():
        ours /= np.linalg.norm(ours, axis=-1, keepdims=True)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max()), found["version"]


def main() -> bool:
    """Trains, exports, compares and writes the page; whether every bar is met."""
    parser = argparse.ArgumentParser(description="exports of fine-tuned runs, in transformers")
    parser.add_argument("--python", default=sys.executable)
    options = parser.parse_args()
    rows, vectors, met, version, pooled_by = [], [], True, "", ""
    for task in TASKS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder)
            data, settings = data_of(task, out)
            longest = {} if task == "lm" else {"longest": 32}
            run = finetune(
                data, task=task, out=out / "run", steps=12, evaluate_every=4, held_out=0.25,
                lr=1e-2, **(SMALL | settings | longest),
            )  # fmt: skip
            run.export(out / "exported")
            asked = texts()
            sent: list[Any] = list(asked)
            if task == "pair":
                sent = [[text, "so yes"] for text in asked]
            if task == "tag":
                sent = [text.split() for text in asked]
            (out / "asked.json").write_text(json.dumps(sent))
            paths = (out / "exported", task, out / "asked.json", out / "theirs.json")
            subprocess.run([options.python, "-c", THEIRS, *map(str, paths)], check=True)
            theirs = json.loads((out / "theirs.json").read_text())
            version = theirs["version"]
            names = list(theirs["labels"].values())
            own = list(getattr(run.model.config, "labels", ()))
            off, same = compared(run, task, asked, theirs)
            good = off <= BAR and same == TEXTS and (not own or names == own)
            met &= good
            told = " ".join(own) or "none"
            rows.append(
                [task, f"{off:.1e}", f"{same} of {TEXTS}", told, "met" if good else "missed"]
            )
            if task != "classify":
                continue
            for name in ("mean of a run", "mean of MiniLM"):
                shutil.rmtree(out / "exported")
                if name == "mean of a run":
                    run.export(out / "exported", vectors=True)
                    parts = *exported_encoder(out / "exported"), run.tokenizer
                else:
                    parts = minilm()
                    save_checkpoint(out / "exported", *parts[:2])
                off, pooled_by = vectors_compared(*parts, out, options.python)
                met &= (good := off <= BAR)
                vectors.append([name, f"{off:.1e}", "–", "none", "met" if good else "missed"])
    head = ["task", "largest difference", "same answers", "labels", f"bar {BAR:g}"]
    said = (
        f"Runs of `mpjax.finetune`, exported; transformers {version} in another process."
        " Probabilities of classes are compared, of tags and tokens logits relative to their size;"
        f" vectors of {TEXTS} texts with sentence-transformers {pooled_by}, relative to the largest"
        " number."
    )
    shown = table(head, rows + vectors)
    write("finetuned_export", "Fine-tuned runs in transformers", f"{said}\n\n{shown}")
    return met


if __name__ == "__main__":
    sys.exit(not main())
