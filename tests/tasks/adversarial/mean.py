"""An encoder whose classes are read off the mean of its embeddings, here and in NumPy.

In float64: m is the mean over what is kept of E[ids] + offset, the logits are tanh(m) W.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.models import Encoder
from mpjax.models.core.layers import shifted
from mpjax.models.transformer.encoder_config import encoder_config
from mpjax.precision import get_precision

BROKEN = 39  # an id whose rows have an infinite slope where there is no offset
V, D, C = 40, 4, 3


class Mean(Encoder):
    """See above."""

    def apply(
        self, params: Any, inputs: Any, *, state: Any = None, key: Any = None, train: bool = False
    ) -> Any:
        x = params["embed"][inputs["ids"]]
        offset = inputs.get("offset", jnp.zeros_like(x))
        keep = inputs["keep"][..., None]
        count = jnp.sum(keep, 1).astype(jnp.float32)
        x = shifted(x, offset, "mean")
        m = jnp.sum(jnp.where(keep, x, 0.0), 1) / count
        h = jnp.tanh(m)
        if train and key is not None:
            h = h * dropped(key, h.shape)
        steep = jnp.where(inputs["ids"] == BROKEN, jnp.abs(offset[..., 0]), 1.0)
        logits = h @ params["head"] + jnp.sum(jnp.sqrt(steep), 1, keepdims=True)
        return {"class": logits, "token": x @ params["head"]}, state

    def init(self, key: Any) -> Any:
        draw = jax.random.split(key)
        embed = jax.random.normal(draw[0], (V, D))
        head = jax.random.normal(draw[1], (D, self.config.classes))
        return {"embed": embed / 2, "head": 2 * head}


def dropped(key: Any, shape: tuple[int, ...]) -> Any:
    return jax.random.bernoulli(key, 0.75, shape).astype(jnp.float32) / 0.75


def mean_encoder(**changes: Any) -> Mean:
    shape = dict(layers=1, width=D, heads=1, vocabulary=V, head="class", classes=C)
    return Mean(encoder_config("bert-tiny", **(shape | changes)), get_precision("fp32"))


def batch_of(rows: int = 6, length: int = 5, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, BROKEN, (rows, length)).astype(np.int32)
    ids[:, 0] = 2
    keep = np.arange(length) < rng.integers(2, length + 1, (rows, 1))
    labels = rng.integers(0, C, rows).astype(np.int32)
    return {"ids": jnp.asarray(ids), "keep": jnp.asarray(keep), "labels": jnp.asarray(labels)}


class Exact:
    """The same in float64, with gradients by hand."""

    def __init__(self, params: Any, batch: Any, masks: Any = 1.0):
        self.embed, self.head = (np.asarray(params[n], np.float64) for n in ("embed", "head"))
        self.ids, self.keep, self.labels = (np.asarray(batch[n]) for n in ("ids", "keep", "labels"))
        self.masks = masks
        self.room = (self.keep & (self.ids != 2))[..., None]

    def log_p(self, offset: Any = 0.0, masks: Any = None) -> np.ndarray:
        x = (self.embed[self.ids] + offset) * self.keep[..., None]
        self.h = np.tanh(x.sum(1) / self.keep.sum(1, keepdims=True))
        logits = self.h * (self.masks if masks is None else masks) @ self.head + self.ids.shape[1]
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def pulled(self, d_logits: np.ndarray) -> np.ndarray:
        """The gradient by the offset, of the last `log_p`, where there is room."""
        dm = (d_logits @ self.head.T) * self.masks * (1 - self.h**2)
        return (dm / self.keep.sum(1, keepdims=True))[:, None] * self.room

    def loss(self, offset: Any = 0.0, masks: Any = None) -> float:
        picked = np.take_along_axis(self.log_p(offset, masks), self.labels[:, None], 1)
        return float(-picked.mean())

    def loss_slope(self, offset: Any) -> np.ndarray:
        return self.pulled(np.exp(self.log_p(offset)) - np.eye(C)[self.labels])


def size(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x**2).sum((1, 2), keepdims=True))


def ball(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x * np.minimum(1, epsilon / np.maximum(size(x), 1e-30))


def kl(log_a: np.ndarray, log_b: np.ndarray) -> np.ndarray:
    return (np.exp(log_a) * (log_a - log_b)).sum(-1)


def climbed(
    exact: Exact, offset: Any, epsilon: float, step: float, steps: int, norm: str = "l2"
) -> list[np.ndarray]:
    offsets = [offset]
    for _ in range(steps):
        g = exact.loss_slope(offset)
        if norm == "l2":
            offset = ball(offset + step * g / size(g), epsilon)
        else:
            offset = np.clip(offset + step * np.sign(g), -epsilon, epsilon)
        offsets.append(offset)
    return offsets
