"""Tiny checkpoints of each architecture: settings, ids, and weights by a rule.

A weight is drawn from its name, so that nobody needs to keep it:
`benchmarks/checkpoints/hf_logits.py` gives the same ones to transformers, whose logits are in
`tests/golden/hf_logits.json`.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

T = 12  # tokens a row
VOCABULARY = 11
_SIZE = dict(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
)
_LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=2.0,
    original_max_position_embeddings=16,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": dict(
        model_type="gpt2", architectures=["GPT2LMHeadModel"],
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=4,
    ),
    "llama": _SIZE | dict(
        model_type="llama", architectures=["LlamaForCausalLM"],
        num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=_LLAMA3,
    ),
    "mistral": _SIZE | dict(
        model_type="mistral", architectures=["MistralForCausalLM"],
        num_key_value_heads=2, head_dim=4, sliding_window=5,
    ),
    "qwen2": _SIZE | dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"],
        num_key_value_heads=1,
        rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=2.0),
    ),
    "qwen3": _SIZE | dict(
        model_type="qwen3", architectures=["Qwen3ForCausalLM"],
        num_key_value_heads=2, head_dim=6, rms_norm_eps=1e-3,
    ),
    "bert": _SIZE | dict(model_type="bert", architectures=["BertForPreTraining"]),
}  # fmt: skip


def ids(name: str) -> np.ndarray:
    """Token ids of a case: (2, T) for BERT, one of them padded, else (1, T)."""
    rows = 2 if name == "bert" else 1
    return _rng(name).integers(0, VOCABULARY, (rows, T)).astype(np.int32)


def token_types() -> np.ndarray:
    """Token types (2, T): the second sentence begins in the middle."""
    return np.broadcast_to(np.arange(T) >= T // 2, (2, T)).astype(np.int32)


def keep() -> np.ndarray:
    """Which tokens are none of the padding, (2, T): the second row is shorter."""
    return np.arange(T)[None, :] < np.array([[T], [T - 3]])


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of a tensor, far enough from 0 and 1 that a mistake in any is seen."""
    centre = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
    return (centre + 0.3 * _rng(name).standard_normal(shape)).astype(np.float32)


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))
