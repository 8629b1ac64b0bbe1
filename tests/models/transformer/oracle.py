"""The whole decoder again, in bare float64 numpy: one sequence, one token at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def norm(p: Any, x: Any, kind: str, eps: float) -> Any:
    x = x - x.mean() if kind == "layer" else x
    return x / np.sqrt((x * x).mean() + eps) * p["scale"] + p.get("bias", 0.0)


def linear(p: Any, x: Any) -> Any:
    return x @ p["kernel"] + p.get("bias", 0.0)


def frequency(c: Any, j: int) -> float:
    """Radians a token of pair j, stretched as Llama 3's own code does, one case after another."""
    f = c.rope_theta ** (-2 * j / c.per_head)
    if c.rope_scaling == "none":
        return f
    wave = 2 * math.pi / f
    if c.rope_scaling == "linear" or wave > c.rope_context / c.rope_low:
        return f / c.rope_factor
    if wave < c.rope_context / c.rope_high:
        return f
    smooth = (c.rope_context / wave - c.rope_low) / (c.rope_high - c.rope_low)
    return (1 - smooth) * f / c.rope_factor + smooth * f


def turn(c: Any, x_HK: Any, position: int) -> Any:
    half = x_HK.shape[-1] // 2
    z = x_HK[:, :half] + 1j * x_HK[:, half:]
    z = z * np.exp(1j * position * np.array([frequency(c, j) for j in range(half)]))[None]
    return np.concatenate([z.real, z.imag], -1)


def token(c: Any, p: Any, x: Any, position: int, memory: list[Any]) -> Any:
    """One block on one token; memory holds this layer's keys and values so far."""
    a, m = p["attention"], p["mlp"]
    y = norm(p["norm_attention"], x, c.norm, c.epsilon) if c.norm_first else x
    q, k, v = (linear(a[n], y).reshape(-1, c.per_head) for n in ("query", "key", "value"))
    if c.qk_norm:
        q = np.stack([norm(a["norm_query"], head, "rms", c.epsilon) for head in q])
        k = np.stack([norm(a["norm_key"], head, "rms", c.epsilon) for head in k])
    if c.position == "rotary":
        q, k = turn(c, q, position), turn(c, k, position)
    memory.append((k, v))
    seen = memory[-c.window :]  # all of it where the window is 0
    heads = []
    for h in range(c.heads):
        g = h * c.groups // c.heads
        scores = np.array([k[g] @ q[h] for k, _ in seen]) / np.sqrt(c.per_head)
        weights = np.exp(scores - scores.max())
        heads.append(sum(w * v[g] for w, (_, v) in zip(weights, seen, strict=True)) / sum(weights))
    x = x + linear(a["out"], np.concatenate(heads))
    x = x if c.norm_first else norm(p["norm_attention"], x, c.norm, c.epsilon)
    y = norm(p["norm_mlp"], x, c.norm, c.epsilon) if c.norm_first else x
    if c.activation == "gelu":
        y = linear(m["up"], y)
        y = y * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    elif c.activation == "gelu_exact":
        y = linear(m["up"], y)
        y = y * np.array([(1 + math.erf(one / math.sqrt(2))) / 2 for one in y])
    elif c.activation == "relu":
        y = np.maximum(linear(m["up"], y), 0)
    else:
        gate = linear(m["gate"], y)
        y = gate / (1 + np.exp(-gate)) * linear(m["up"], y)
    x = x + linear(m["down"], y)
    return x if c.norm_first else norm(p["norm_mlp"], x, c.norm, c.epsilon)


def logits(c: Any, params: Any, ids: Any) -> Any:
    """Logits (T, V) of one sequence; params are float64 numpy."""
    p, out = params["decoder"], []
    blocks = [slice_tree(p["layers"], i) for i in range(c.layers)]
    memories: list[list[Any]] = [[] for _ in blocks]
    for position, i in enumerate(ids):
        x = p["embed"]["table"][i] * (math.sqrt(c.width) if c.scale_embed else 1)
        x = x + p["position"]["table"][position] if c.position == "learned" else x
        if c.position == "sinusoidal":
            angles = [position / 10000 ** (2 * j / c.width) for j in range(c.width // 2)]
            x = x + np.array([f(a) for a in angles for f in (math.sin, math.cos)])
        x = norm(p["norm_embed"], x, c.norm, c.epsilon) if c.norm_embed else x
        for block, memory in zip(blocks, memories, strict=True):
            x = token(c, block, x, position, memory)
        x = norm(p["norm"], x, c.norm, c.epsilon) if c.norm_first else x
        out.append(p["embed"]["table"] @ x if c.tied else linear(p["head"], x))
    z = np.stack(out)
    return c.logit_cap * np.tanh(z / c.logit_cap) if c.logit_cap else z


def slice_tree(tree: Any, i: int) -> Any:
    return {k: slice_tree(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}
