"""The original Transformer (post-norm, ReLU, sinusoids) in bare float64 numpy, one pair."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.models.transformer.encoder_oracle import norm
from tests.models.transformer.oracle import linear, slice_tree


def attend(c: Any, p: Any, x: Any, source: Any, causal: bool) -> Any:
    q, k, v = linear(p["query"], x), linear(p["key"], source), linear(p["value"], source)
    K, heads = c.width // c.heads, []
    for h in range(c.heads):
        own = slice(h * K, (h + 1) * K)
        weights = np.exp(q[:, own] @ k[:, own].T / np.sqrt(K))
        weights = np.tril(weights) if causal else weights
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, own])
    return linear(p["out"], np.concatenate(heads, -1))


def sinusoids(tokens: int, width: int) -> Any:
    out = np.zeros((tokens, width))
    for t, i in np.ndindex(tokens, width // 2):
        angle = t / 10000 ** (2 * i / width)
        out[t, 2 * i], out[t, 2 * i + 1] = np.sin(angle), np.cos(angle)
    return out


def half(c: Any, p: Any, table: Any, ids: Any, layers: int, source: Any = None) -> Any:
    x = table[ids] * np.sqrt(c.width) + sinusoids(len(ids), c.width)
    for block in (slice_tree(p["layers"], i) for i in range(layers)):
        x = x + attend(c, block["attention"], x, x, source is not None)
        x = norm(block["norm_attention"], x, c.epsilon)
        if source is not None:
            x = x + attend(c, block["cross_attention"], x, source, False)
            x = norm(block["norm_cross_attention"], x, c.epsilon)
        x = x + linear(block["mlp"]["down"], np.maximum(linear(block["mlp"]["up"], x), 0))
        x = norm(block["norm_mlp"], x, c.epsilon)
    return x


def logits(c: Any, params: Any, source: Any, ids: Any) -> Any:
    table = params["decoder"]["embed"]["table"]
    read = half(c, params["encoder"], table, source, c.encoder.layers)
    return half(c, params["decoder"], table, ids, c.layers, read) @ table.T
