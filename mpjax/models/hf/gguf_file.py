"""GGUF files of llama.cpp, under the names and settings that `transformers` has for them."""

from __future__ import annotations

import functools
import re
import struct
from pathlib import Path

import numpy as np

from mpjax.errors import ConfigError, brief, listed, need, printable
from mpjax.models.hf.fields import Fields
from mpjax.models.hf.gguf_reader import GgufFile, GgufTensor, read_layout
from mpjax.models.hf.gguf_tokenizer import gguf_special
from mpjax.models.hf.tensor_files import Tensor, Tensors
from mpjax.typing import Settings

_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # also of Mistral and SmolLM2
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Key below the architecture's name -> field of config.json.
_FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
}
_CHECKED = ("rope.freq_base", "rope.dimension_count", "attention.value_length")
_SCALING = {"rope.scaling.type": "rope_type", "rope.scaling.factor": "factor"}


def open_gguf(path: Path) -> GgufFile:
    """Returns the settings and tensors of a GGUF file.

    Raises:
      ConfigError: a file that is absent, truncated or no GGUF file, or no package `gguf`.
    """
    package = need("gguf", "hub", str(path))
    try:
        return read_layout(path, package)
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(
            f"{path}: not a whole GGUF file ({printable(str(error), 200)}); fetch it again"
        ) from error


def read_gguf(path: Path, file: GgufFile) -> tuple[Settings, Tensors]:
    """Returns the fields of a config.json and the tensors of a GGUF file, dequantised when read.

    llama.cpp stores the rows of a Llama's queries and keys in the order of interleaved rotary
    pairs; here they are back in that of halves.

    Args:
      path: for errors.
      file: from `open_gguf`.

    Raises:
      ConfigError: another architecture, or a setting or tensor that is not known.
    """
    value = {name: field.contents() for name, field in file.fields.items() if "." in name
             and not name.startswith(("tokenizer.", "GGUF."))}  # fmt: skip
    kind = value.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise ConfigError(
            f"{path}: architecture {brief(kind)}; expected {' '.join(_ARCHITECTURES)}; take the"
            " safetensors of this model"
        )
    own = {n.removeprefix(f"{kind}."): v for n, v in value.items() if n.startswith(f"{kind}.")}
    if unknown := sorted(set(own) - {*_FIELDS, *_CHECKED, *_SCALING}):
        raise ConfigError(
            f"{path}: unknown setting {listed(f'{kind}.{n}' for n in unknown)}, which may change"
            " the result; take the safetensors of this model"
        )
    config: Settings = {"model_type": kind, "bos_token_id": None, "eos_token_id": None}
    config |= gguf_special(path, file.fields)
    config |= {field: own[name] for name, field in _FIELDS.items() if name in own}
    rope = {field: own[name] for name, field in _SCALING.items() if name in own}
    if rope.get("rope_type") in (None, "none"):
        rope = {"rope_type": "default"}
    config["rope_parameters"] = rope | {"rope_theta": own.get("rope.freq_base", 10000.0)}
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConfigError(f"{path}: no embedding of two axes in it; fetch it again")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    sizes = Fields(config, str(path))
    heads = sizes.take("num_attention_heads", int, least=1)
    groups = sizes.take("num_key_value_heads", int, heads, least=1)
    width = sizes.take("head_dim", int, sizes.take("hidden_size", int, least=1) // heads, least=1)
    config |= {"num_key_value_heads": groups, "head_dim": width}
    for name in ("rope.dimension_count", "attention.value_length"):
        if own.get(name, width) != width:
            raise ConfigError(
                f"{path}: {kind}.{name}={brief(own[name])} is not the head width {width}, which is"
                " not supported; take another model"
            )
    tensors, decoded = {}, set()
    for name, tensor in file.tensors.items():
        full, turned = _renamed(path, name), 0
        if kind == "llama":
            turned = {"attn_q": heads, "attn_k": groups}.get(name.split(".")[-2], 0)
        if turned and tensor.shape[0] % (2 * turned):
            raise ConfigError(
                f"{path}: {name} of shape {tensor.shape} is not that of {turned} heads with rotary"
                " pairs; fetch it again"
            )
        if tensor.kind not in decoded:
            _check_kind(path, name, tensor)
            decoded.add(tensor.kind)
        read = functools.partial(_dequantised, tensor, turned)
        tensors[full] = Tensor(tensor.shape, np.dtype(np.float32), read)
    return config, tensors


def _check_kind(path: Path, name: str, tensor: GgufTensor) -> None:
    """Decodes one row, to refuse a type that the package cannot decode."""
    from gguf.quants import dequantize

    try:
        dequantize(tensor.data.reshape(-1, tensor.data.shape[-1])[:1], tensor.kind)
    except NotImplementedError as error:
        raise ConfigError(
            f"{path}: {name} is of type {tensor.kind.name}, which cannot be decoded ({error}); take"
            " the safetensors of this model"
        ) from None


def _renamed(path: Path, name: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found is None or found[2] not in _INNER:
        raise ConfigError(
            f"{path}: unknown tensor {listed([name])}; take the safetensors of this model"
        )
    return f"model.layers.{found[1]}.{_INNER[found[2]]}.{found[3]}"


def _dequantised(tensor: GgufTensor, heads: int) -> np.ndarray:
    """Returns a tensor in float32; rows of `heads` heads go from pairs back to halves."""
    from gguf.quants import dequantize

    shape = tensor.shape
    x = dequantize(tensor.data, tensor.kind).reshape(shape)
    if heads:
        x = x.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)
    return x
