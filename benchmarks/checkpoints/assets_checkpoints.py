"""Real checkpoints give what they are known to give, and loading one needs little more than it.

Run:       python -m benchmarks.checkpoints.assets_checkpoints  (fetches 250 MB at first use)
Expected:  MiniLM's embedding of a sentence starts .067657 .063496 .048713; rxnfp restores 44 of 54
           masked tokens of a reaction; SmolLM2 answers "The capital of France is Paris."; in
           float32 and, with the difference stated, in bfloat16 and with int8 weights. Loading takes
           at most the bytes of the parameters and the largest tensor on top.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import tokenizers

from benchmarks.common.page import write
from common.datasets.assets import fetch
from mpjax.markdown import table
from mpjax.models import decoder, quantize_weights
from mpjax.models.hf import load_checkpoint, open_checkpoint, save_checkpoint

INT8 = "fp32, int8 weights"  # the weights of products, a scale for each of their outputs
SCRIPT = "benchmarks.checkpoints.assets_checkpoints"
PRECISIONS = ("fp32", "bf16", INT8)
SENTENCE, KNOWN = "This is an example sentence", (0.067657, 0.063496, 0.048713)
# The example of rxnmapper's README, and rxnfp's own way to cut a reaction into tokens.
REACTION = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
PIECES = re.compile(
    r"%\([0-9]{3}\)|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?"
    r"|>>?|\*|\$|%[0-9]{2}|[0-9]"
)
PROMPTS = {
    "The capital of France is": "The capital of France is Paris.",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n": "The capital of France is Paris.",
}
LENGTH, STEPS = 64, 10
# What annalog's own code gives under torch 2.13.0 for the pairs of `molecules`.
MOLECULES = np.array([
    [-14.19371223449707, -14.187904357910156, -14.247981071472168, 0.5229489803314209],
    [-14.403935432434082, -14.410259246826172, -14.426288604736328, -4.06188440322876],
])  # fmt: skip


def loaded(source: Any, precision: str, **options: Any) -> tuple[Any, Any]:
    """A checkpoint's model and weights, stored in int8 if that is asked for."""
    model, params = load_checkpoint(source, precision.split(",")[0], **options)
    return model, quantize_weights(params, "int8") if precision == INT8 else params


def embedding(precision: str) -> np.ndarray:
    """MiniLM's vector of the sentence: the mean over tokens, of length 1."""
    checkpoint = open_checkpoint(fetch("minilm"))
    tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json() or "")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    model, params = loaded(checkpoint, precision)
    ids = np.array([tokenizer.encode(SENTENCE).ids], np.int32)
    features = jax.jit(lambda p, i: model.apply(p, i)[0]["features"])(params, ids)
    mean = np.asarray(features, np.float64)[0].mean(0)
    return mean / np.linalg.norm(mean)


def restored(precision: str) -> tuple[int, int, np.ndarray]:
    """Tokens of the reaction that rxnfp's BERT restores, each masked alone; all; its logits."""
    folder = fetch("rxnfp")
    vocabulary = (folder / "vocab.txt").read_text().splitlines()
    tokens = ["[CLS]", *PIECES.findall(REACTION), "[SEP]"]
    ids = np.array([vocabulary.index(token) for token in tokens], np.int32)
    model, params = loaded(folder, precision, architecture="bert", head="pretrain")
    at = np.arange(1, len(ids) - 1)
    rows = np.tile(ids, (len(at), 1))
    rows[at - 1, at] = vocabulary.index("[MASK]")
    logits = jax.jit(lambda p, i: model.apply(p, i)[0]["masked"])(params, rows)
    found = np.asarray(logits, np.float32)[at - 1, at]
    return int((found.argmax(-1) == ids[at]).sum()), len(at), found


def molecules(precision: str) -> np.ndarray:
    """Logits that annalog's encoder-decoder gives behind the last token of two drawn pairs."""
    file = fetch("annalog") / "ckpt_and_vocab" / "Lev_extended.pt"
    shape = dict(vocabulary=59, source_vocabulary=59, layers=3, width=256, heads=8)
    model, params = loaded(
        file, precision, architecture="pytorch-seq2seq", mlp_width=512, context=102, **shape
    )
    rng = np.random.default_rng(0)
    source, inputs = (rng.integers(2, 59, (2, n)).astype(np.int32) for n in (20, 15))
    keep = np.arange(20)[None, :] < np.array([[20], [12]])
    batch = {"source": source, "inputs": inputs, "source_keep": keep}
    return np.asarray(jax.jit(lambda p, b: model.apply(p, b)[0])(params, batch), np.float32)[:, -1]


@functools.cache
def smollm2() -> tuple[Any, tokenizers.Tokenizer]:
    """The GGUF file, opened, and its tokenizer."""
    checkpoint = open_checkpoint(next(fetch("smollm2").glob("*.gguf")))
    return checkpoint, tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json() or "")


def answers(precision: str) -> tuple[list[str], np.ndarray]:
    """SmolLM2's greedy continuations, and its logits behind the first prompt."""
    checkpoint, tokenizer = smollm2()
    model, params = loaded(checkpoint, precision)
    run = jax.jit(lambda p, i: model.apply(p, i)[0])
    texts, first = [], None
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        row, n = np.zeros((1, LENGTH), np.int32), len(ids)
        row[0, :n] = ids  # what stands behind is not seen: attention is causal
        for _ in range(STEPS):
            logits = np.asarray(run(params, row)[0, n - 1], np.float32)
            first = logits if first is None else first
            row[0, n] = logits.argmax()
            n += 1
        start = 0 if "<|im_start|>" not in prompt else len(ids)
        texts.append(tokenizer.decode(row[0, start:n].tolist(), skip_special_tokens=False))
    assert first is not None
    return texts, first


def anonymous() -> int:
    """Bytes of memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]


def measure(folder: str, precision: str) -> None:
    """Prints the peak of memory while a checkpoint loads, over what there was before."""
    kept = load_checkpoint(Path(folder) / "warm", precision)  # what JAX itself keeps
    start, peak, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    _, params = load_checkpoint(Path(folder) / "large", precision)
    done.set()
    thread.join()
    stored = sum(x.nbytes for x in jax.tree.leaves(params))
    print(stored, max(peak, anonymous()) - start)
    del kept  # not before: the memory that it frees would be used again, and be missed above


def memory() -> tuple[list[list[str]], bool]:
    """Rows of the peak while a generated checkpoint of float32 loads."""
    shape: dict[str, Any] = dict(vocabulary=16384, width=512, heads=8, context=64)
    rows, good = [], True
    with tempfile.TemporaryDirectory() as temporary:
        for name, layers in (("warm", 1), ("large", 16)):
            model = decoder("gpt2", layers=layers, **shape)
            save_checkpoint(Path(temporary) / name, model, model.init(jax.random.key(0)))
        largest = max(
            int(np.prod(t.shape)) * 4
            for t in open_checkpoint(f"{temporary}/large").tensors.values()
        )
        for rules in ("fp32", "p=bf16,c=bf16,o=bf16"):
            found = subprocess.run(
                [sys.executable, "-m", SCRIPT, "measure", temporary, rules],
                check=True, capture_output=True, text=True,
            ).stdout.split()  # fmt: skip
            stored, peak = map(int, found)
            good = good and peak <= stored + largest
            rows.append([rules, *(f"{n / 1e6:.1f}" for n in (stored, largest, peak))])
    return rows, good


def main() -> None:
    """Measures and writes the page."""
    vectors = {p: embedding(p) for p in PRECISIONS}
    whole = vectors["fp32"]
    rows = [
        [p, " ".join(f"{x:.6f}" for x in v[:3]), f"{np.abs(v - whole).max():.1e}",
         f"{1 - v @ whole / np.linalg.norm(v):.1e}"]
        for p, v in vectors.items()
    ]  # fmt: skip
    good = [float(np.abs(whole[:3] - KNOWN).max()) < 1e-6]
    masked = {p: restored(p) for p in PRECISIONS}
    scale = np.abs(masked["fp32"][2]).max()
    masks = [
        [p, f"{right} of {count}", f"{np.abs(logits - masked['fp32'][2]).max() / scale:.1e}"]
        for p, (right, count, logits) in masked.items()
    ]
    good.append(masked["fp32"][:2] == (44, 54))
    spoken = {p: answers(p) for p in PRECISIONS}
    scale = np.abs(spoken["fp32"][1]).max()
    says = [
        [p, f"{np.abs(logits - spoken['fp32'][1]).max() / scale:.1e}", *(f"`{t!r}`" for t in texts)]
        for p, (texts, logits) in spoken.items()
    ]
    good.append(
        all(t.startswith(w) for t, w in zip(spoken["fp32"][0], PROMPTS.values(), strict=True))
    )
    pairs = {p: molecules(p) for p in PRECISIONS}
    scale = np.abs(pairs["fp32"]).max()
    written = [
        [p, f"{np.abs(x[:, :4] - MOLECULES).max() / scale:.1e}",
         f"{np.abs(x - pairs['fp32']).max() / scale:.1e}"]
        for p, x in pairs.items()
    ]  # fmt: skip
    good.append(bool(np.abs(pairs["fp32"][:, :4] - MOLECULES).max() <= 2e-5 * scale))
    peaks, fits = memory()
    good.append(fits)
    write(
        "assets_checkpoints",
        "Real checkpoints give what they are known to give",
        f"""MiniLM (safetensors), the embedding of {SENTENCE!r}: mean over tokens, length 1. \
Known start: {KNOWN}.

{table(["precision", "starts", "largest difference from fp32", "1 - cosine"], rows)}

rxnfp's BERT (a pytorch_model.bin from before torch's zip format, read without torch), each token of
`{REACTION}` masked alone; known: 44 of 54.

{table(["precision", "restored", "difference of logits from fp32 / largest"], masks)}

SmolLM2-135M-Instruct (GGUF, Q4_1, dequantised), greedy: the continuation of "The capital of \
France is", and the answer to "What is the capital of France?" in its chat format.

{table(["precision", "difference of logits from fp32 / largest", "continues", "answers"], says)}

annalog's encoder-decoder (a state dict alone, in torch's zip format): two drawn pairs, one source
padded, against the logits that its own code gives under torch 2.13.0.

{table(["precision", "difference from its own code / largest", "from fp32 / largest"], written)}

Memory that no file backs, at its peak while a generated float32 checkpoint loads, over what there
was before, in MB; the bar is parameters + largest tensor of the file.

{table(["stored as", "parameters", "largest tensor", "peak"], peaks)}

All as expected: {"yes" if all(good) else "**no**"} ({good}).""",
    )
    sys.exit(not all(good))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        from mpjax.precision import get_precision

        rule = sys.argv[3]
        given = (
            rule
            if "=" not in rule
            else get_precision("fp32", rules=[f"**={rule}"], update="nearest")
        )
        measure(sys.argv[2], given)  # type: ignore[arg-type]
    else:
        main()
