"""Logits of imported and exported checkpoints against transformers, on the same random weights.

Run:       python -m benchmarks.checkpoints.hf_logits
           in an environment that has torch and transformers too: pip install torch transformers
Expected:  max |ours - theirs| <= 2e-5 max |theirs| in float32 for every architecture, above it for
           every planted mistake; an export loads in transformers with nothing missing and gives
           the same logits; import -> export -> import is bit-equal.

Writes `tests/golden/hf_logits.json` too: what transformers gave, for the tests, which have no
torch. The weights are not kept: `tests/models/hf/cases.py` draws them from their names.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from benchmarks.common.page import ROOT, write
from mpjax.markdown import table
from mpjax.models.hf import load_checkpoint, save_checkpoint
from tests.models.hf import cases, ours

try:
    import torch
    import transformers
except ImportError as error:
    sys.exit(f"hf_logits: {error}; pip install torch transformers")

GOLDEN = ROOT / "tests" / "golden" / "hf_logits.json"
SAYS = {True: "yes", False: "**no**"}


def build(name: str, dtype: str = "float32") -> Any:
    """The model of a case, its weights drawn by the rule."""
    fields = dict(cases.CONFIGS[name])
    kind = getattr(transformers, fields["architectures"][0])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    config._attn_implementation = "eager"  # the plain definition
    model = kind(config).eval()
    with torch.no_grad():
        for weight_name, tensor in model.named_parameters():  # a tied one comes once
            drawn = cases.weight(weight_name, tuple(tensor.shape))
            tensor.copy_(torch.from_numpy(drawn))
    return model.to(getattr(torch, dtype))


def load(folder: Path) -> Any:
    """The model of a folder, as transformers loads it; nothing may be missing or unexpected."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    model, info = kind.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    wrong = {k: v for k, v in info.items() if v}
    assert not wrong, wrong
    return model.eval()


def logits(name: str, model: Any) -> dict[str, np.ndarray]:
    """Logits of a case."""
    given = {"input_ids": torch.from_numpy(cases.ids(name).astype(np.int64))}
    if name == "bert":
        given["token_type_ids"] = torch.from_numpy(cases.token_types().astype(np.int64))
        given["attention_mask"] = torch.from_numpy(cases.keep().astype(np.int64))
    with torch.no_grad():
        out = model(**given)
    names = {"prediction_logits": "masked", "seq_relationship_logits": "next", "logits": "logits"}
    return {ours: out[n].float().numpy() for n, ours in names.items() if n in out}


def shapes(model: Any) -> dict[str, list[int]]:
    """Names and shapes of the tensors that save_pretrained writes."""
    return {name: list(tensor.shape) for name, tensor in model.named_parameters()}


def equal(a: Any, b: Any) -> bool:
    """Whether two trees are bit for bit the same."""
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(),
                        *(jax.tree.map(np.asarray, tree) for tree in (a, b)))  # fmt: skip
    structure: Any = jax.tree.structure(a)
    return structure == jax.tree.structure(b) and all(jax.tree.leaves(same))


def short(x: np.ndarray) -> Any:
    """Nested lists of the shortest decimals that give the same float32."""
    return [short(y) for y in x] if x.ndim else float(str(x))


def compare(name: str, folder: Path) -> tuple[list[str], dict[str, Any], bool]:
    """A row of the table, what the golden file keeps, and whether the case holds."""
    model = build(name)
    model.save_pretrained(folder / "theirs")
    want = logits(name, model)
    mine, params = load_checkpoint(folder / "theirs")
    found = ours.worst(name, ours.outputs(name, mine, params), want)
    exact = logits(name, build(name, "float64"))
    own = ours.worst(name, want, exact)
    save_checkpoint(folder / "ours", mine, params, shard_bytes=4000)
    back = ours.worst(name, logits(name, load(folder / "ours")), want)
    again = load_checkpoint(folder / "ours")
    bits = equal(params, again[1]) and again[0].config == mine.config
    shards = len(list((folder / "ours").glob("*.safetensors")))
    row = [name, f"{found:.1e}", f"{own:.1e}", f"{back:.1e} ({shards} files)", SAYS[bits]]
    kept = {"tensors": shapes(model), "logits": {k: short(v) for k, v in want.items()}}
    return row, kept, found <= ours.BAR and back == 0 and bits


def control(title: str, folder: Path, golden: dict[str, Any]) -> tuple[list[str], bool]:
    """A row of the table of planted mistakes, and whether it was caught."""
    name, change = ours.CONTROLS[title]
    ours.write(name, golden[name]["tensors"], folder)
    change(folder)
    error = ours.worst(name, ours.outputs(name, *load_checkpoint(folder)), golden[name]["logits"])
    return [title, name, f"{error:.1e}", SAYS[error > ours.BAR]], error > ours.BAR


def main() -> None:
    """Compares, and writes the page and the logits that the tests use."""
    rows, kept, good = [], {}, True
    with tempfile.TemporaryDirectory() as temporary:
        for name in cases.CONFIGS:
            row, kept[name], holds = compare(name, Path(temporary) / name)
            rows.append(row)
            good = good and holds
        caught = []
        for i, title in enumerate(ours.CONTROLS):
            row, holds = control(title, Path(temporary) / str(i), kept)
            caught.append(row)
            good = good and holds
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    used = " and ".join(f"{name} {version}" for name, version in versions.items())
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({"versions": versions, "cases": kept}) + "\n")
    write(
        "hf_logits",
        "Imported and exported checkpoints against transformers",
        f"""Against {used}, which it needs beside mpjax's own packages. Tiny random models \
in float32; the bar is max abs difference <= {ours.BAR:.0e} x the largest logit. "theirs" is their \
float32 against their float64, for scale. An export must give transformers the very same logits.

{table(["architecture", "ours - theirs", "theirs", "export - theirs", "round trip"], rows)}

Planted mistakes, which must lie above the bar:

{table(["mistake", "in", "difference", "caught"], caught)}

All as expected: {SAYS[good]}.""",
        "python -m benchmarks.checkpoints.hf_logits",
    )
    sys.exit(not good)


if __name__ == "__main__":
    main()
