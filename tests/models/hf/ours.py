"""What our models compute for the cases of `cases.py`, and mistakes that must not pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.models.hf import cases

FAST = {"xla_backend_optimization_level": 0}  # half the compile time
BAR = 2e-5  # of the largest logit: float32 sums in another order


def write(name: str, shapes: dict[str, Any], folder: Path) -> Path:
    """A checkpoint of a case, as save_pretrained would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: cases.weight(n, tuple(shape)) for n, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(cases.CONFIGS[name]))
    return folder


def outputs(name: str, model: Any, params: Any) -> dict[str, np.ndarray]:
    """Logits of a case in float32."""
    inputs: Any = jnp.asarray(cases.ids(name))
    if name == "bert":
        inputs = {"ids": inputs, "types": cases.token_types(), "keep": cases.keep()}
    run = jax.jit(lambda params, inputs: model.apply(params, inputs)[0], compiler_options=FAST)
    out = run(params, inputs)
    found = {n: out[n] for n in ("masked", "next")} if name == "bert" else {"logits": out}
    return {n: np.asarray(x, np.float32) for n, x in found.items()}


def worst(name: str, found: dict[str, np.ndarray], want: dict[str, Any]) -> float:
    """The largest difference, over the largest logit, of what is no padding."""
    assert set(found) == set(want)
    errors = []
    for key, wanted in want.items():
        a, b = found[key], np.asarray(wanted, np.float32)
        assert a.shape == b.shape
        if name == "bert" and a.ndim == 3:
            a, b = a[cases.keep()], b[cases.keep()]
        errors.append(float(np.abs(a - b).max() / np.abs(b).max()))
    return max(errors)


def _tensors(edit: Callable[[dict[str, np.ndarray]], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)

    return change


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _zero(name: str) -> Callable[[Path], None]:
    return _tensors(lambda tensors: tensors[name].fill(0))


def _pairs(tensors: dict[str, np.ndarray]) -> None:
    """Queries and keys in the order of interleaved pairs, as a GGUF file has them."""
    for name, x in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            halves = x.reshape(-1, 2, 2, x.shape[1])  # heads of width 4
            tensors[name] = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(x.shape))


_TYPES = "bert.embeddings.token_type_embeddings.weight"
CONTROLS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "one bias dropped": ("gpt2", _zero("transformer.h.1.mlp.c_proj.bias")),
    "the fused bias dropped": ("gpt2", _zero("transformer.h.0.attn.c_attn.bias")),
    "exact gelu for tanh gelu": ("gpt2", _config(activation_function="gelu")),
    "rotary pairs for halves": ("llama", _tensors(_pairs)),
    "no rope scaling": (
        "llama", _config(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    ),
    "no window": ("mistral", _config(sliding_window=None)),
    "a window one longer": ("mistral", _config(sliding_window=6)),
    "a query bias dropped": ("qwen2", _zero("model.layers.0.self_attn.q_proj.bias")),
    "rope unscaled": (
        "qwen2", _config(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    ),
    "a head norm dropped": (
        "qwen3", _tensors(lambda t: t["model.layers.0.self_attn.q_norm.weight"].fill(1)),
    ),
    "token types swapped": (
        "bert",
        _tensors(lambda t: t.update({_TYPES: np.ascontiguousarray(t[_TYPES][::-1])})),
    ),
    "tanh gelu for exact gelu": ("bert", _config(hidden_act="gelu_new")),
    "the vocabulary's bias dropped": ("bert", _zero("cls.predictions.bias")),
    "another epsilon": ("qwen3", _config(rms_norm_eps=1e-5)),
}  # fmt: skip
