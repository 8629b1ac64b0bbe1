"""BERT again, in bare float64 numpy: one text without padding, one head at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.models.transformer.oracle import linear, slice_tree

erf = np.vectorize(math.erf, otypes=[np.float64])


def norm(p: Any, x: Any, eps: float) -> Any:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def gelu(x: Any) -> Any:
    return x * (1 + erf(x / np.sqrt(2))) / 2


def attend(c: Any, p: Any, x: Any) -> Any:
    q, k, v = (linear(p[name], x) for name in ("query", "key", "value"))
    K, heads = c.width // c.heads, []
    for h in range(c.heads):
        own = slice(h * K, (h + 1) * K)
        scores = q[:, own] @ k[:, own].T / np.sqrt(K)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, own])
    return linear(p["out"], np.concatenate(heads, -1))


def outputs(c: Any, params: Any, ids: Any, types: Any) -> dict[str, Any]:
    """All outputs of one text that its parameters have heads for."""
    p, e = params["encoder"], c.epsilon
    x = p["embed"]["table"][ids] + p["position"]["table"][: len(ids)]
    x = norm(p["norm_embed"], x + p["token_type"]["table"][types], e)
    for block in (slice_tree(p["layers"], i) for i in range(c.layers)):
        x = norm(block["norm_attention"], x + attend(c, block["attention"], x), e)
        y = linear(block["mlp"]["down"], gelu(linear(block["mlp"]["up"], x)))
        x = norm(block["norm_mlp"], x + y, e)
    out = {"features": x}
    if "pooler" in p:
        out["pooled"] = np.tanh(linear(p["pooler"]["dense"], x[0]))
    elif c.pool == "mean":
        out["pooled"] = x.mean(0)
    for name, read in (("next", "pooled"), ("class", "pooled"), ("token", "features")):
        if name in p:
            out[name] = linear(p[name]["head"], out[read])
    if "masked" in p:
        m = p["masked"]
        y = norm(m["norm"], gelu(linear(m["dense"], x)), e)
        out["masked"] = y @ p["embed"]["table"].T + m["head"]["bias"]
    return out
