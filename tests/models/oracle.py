"""The whole decoder again, in bare float64 numpy: one sequence, one token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def norm(p: Any, x: Any, kind: str, eps: float) -> Any:
    x = x - x.mean() if kind == "layer" else x
    return x / np.sqrt((x * x).mean() + eps) * p["scale"] + p.get("bias", 0.0)


def linear(p: Any, x: Any) -> Any:
    return x @ p["kernel"] + p.get("bias", 0.0)


def turn(x_HK: Any, position: int, theta: float) -> Any:
    half = x_HK.shape[-1] // 2
    z = x_HK[:, :half] + 1j * x_HK[:, half:]
    z = z * np.exp(1j * position * theta ** (-np.arange(half) / half))[None]
    return np.concatenate([z.real, z.imag], -1)


def token(c: Any, p: Any, x: Any, position: int, memory: list[Any]) -> Any:
    """One block on one token; memory holds this layer's keys and values so far."""
    y, a, m = norm(p["norm_attention"], x, c.norm, c.epsilon), p["attention"], p["mlp"]
    q, k, v = (linear(a[n], y).reshape(-1, c.per_head) for n in ("query", "key", "value"))
    if c.qk_norm:
        q = np.stack([norm(a["norm_query"], head, "rms", c.epsilon) for head in q])
        k = np.stack([norm(a["norm_key"], head, "rms", c.epsilon) for head in k])
    if c.position == "rotary":
        q, k = turn(q, position, c.rope_theta), turn(k, position, c.rope_theta)
    memory.append((k, v))
    heads = []
    for h in range(c.heads):
        g = h * c.groups // c.heads
        scores = np.array([k[g] @ q[h] for k, _ in memory]) / np.sqrt(c.per_head)
        weights = np.exp(scores - scores.max())
        heads.append(
            sum(w * v[g] for w, (_, v) in zip(weights, memory, strict=True)) / sum(weights)
        )
    x = x + linear(a["out"], np.concatenate(heads))
    y = norm(p["norm_mlp"], x, c.norm, c.epsilon)
    if c.activation == "gelu":
        y = linear(m["up"], y)
        y = y * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    else:
        gate = linear(m["gate"], y)
        y = gate / (1 + np.exp(-gate)) * linear(m["up"], y)
    return x + linear(m["down"], y)


def logits(c: Any, params: Any, ids: Any) -> Any:
    """Logits (T, V) of one sequence; params are float64 numpy."""
    p, out = params["decoder"], []
    blocks = [slice_tree(p["layers"], i) for i in range(c.layers)]
    memories: list[list[Any]] = [[] for _ in blocks]
    for position, i in enumerate(ids):
        x = p["embed"]["table"][i]
        x = x + p["position"]["table"][position] if c.position == "learned" else x
        for block, memory in zip(blocks, memories, strict=True):
            x = token(c, block, x, position, memory)
        x = norm(p["norm"], x, c.norm, c.epsilon)
        out.append(p["embed"]["table"] @ x if c.tied else linear(p["head"], x))
    z = np.stack(out)
    return c.logit_cap * np.tanh(z / c.logit_cap) if c.logit_cap else z


def slice_tree(tree: Any, i: int) -> Any:
    return {k: slice_tree(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}
