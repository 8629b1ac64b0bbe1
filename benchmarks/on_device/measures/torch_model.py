"""The decoder of part b in torch: SDPA, fused AdamW, bfloat16 by autocast with float32 weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.RMSNorm):
    """RMSNorm whose weight takes the dtype of its input, which torch's fused kernel asks for."""

    def forward(self, x: Any) -> Any:
        """Returns the normalised features, in their dtype."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Block(nn.Module):
    """RMSNorm, grouped attention with rotary positions, RMSNorm, SwiGLU."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.heads, self.groups, self.width = c.heads, c.groups, c.per_head
        D, K = c.width, c.per_head

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False)

        self.norm_attention = Norm(D, eps=c.epsilon)
        self.norm_mlp = Norm(D, eps=c.epsilon)
        self.query, self.out = linear(D, c.heads * K), linear(c.heads * K, D)
        self.key, self.value = linear(D, c.groups * K), linear(D, c.groups * K)
        self.gate, self.up = linear(D, c.hidden), linear(D, c.hidden)
        self.down = linear(c.hidden, D)

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        """Returns the features behind the block."""
        B, T, _ = x.shape
        y = self.norm_attention(x)

        def heads(y: Any, count: int) -> Any:
            return y.view(B, T, count, self.width).transpose(1, 2)

        def rotated(x: Any) -> Any:
            a, b = x.float().chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

        q, k = rotated(heads(self.query(y), self.heads)), rotated(heads(self.key(y), self.groups))
        v = heads(self.value(y), self.groups)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
        y = self.norm_mlp(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Embedding, blocks, norm, head and the mean cross-entropy.

    Args:
      config: a DecoderConfig.
      tokens: of a sequence.
    """

    def __init__(self, config: Any, tokens: int) -> None:
        super().__init__()
        c = config
        self.embed = nn.Embedding(c.vocabulary, c.width)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.layers))
        self.norm = Norm(c.width, eps=c.epsilon)
        self.head = nn.Linear(c.width, c.vocabulary, bias=False)
        half = c.per_head // 2
        angle = torch.arange(tokens)[:, None] * c.rope_theta ** (-torch.arange(half) / half)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, ids: Any, targets: Any) -> Any:
        """Returns the loss."""
        x = self.embed(ids)
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))  # the residual stream, as in ours
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().view(-1, logits.shape[-1]), targets.reshape(-1))


@torch.no_grad()
def take_weights(model: Decoder, params: Any) -> None:
    """Copies the weights of our decoder, arrays of numpy below `decoder`."""
    p = params["decoder"]

    def put(to: Any, x: Any, turn: bool = False) -> None:
        value = torch.from_numpy(x.copy())
        to.copy_(value.T if turn else value)

    put(model.embed.weight, p["embed"]["table"])
    put(model.norm.weight, p["norm"]["scale"])
    put(model.head.weight, p["head"]["kernel"], turn=True)
    stacked = p["layers"]
    for i, layer in enumerate(model.layers):
        put(layer.norm_attention.weight, stacked["norm_attention"]["scale"][i])
        put(layer.norm_mlp.weight, stacked["norm_mlp"]["scale"][i])
        for part in ("attention", "mlp"):
            for name, leaf in stacked[part].items():
                put(getattr(layer, name).weight, leaf["kernel"][i], turn=True)


class Stepper:
    """A train step in torch that waits for the device: clip, fused AdamW, bfloat16.

    Args:
      model: on the device.
      batch: token ids and targets, arrays of numpy.
      compiled: whether `torch.compile` compiles the loss.
      learning_rate: of AdamW.
      clip: largest global norm of the gradients.
      optimizer: one to share with another stepper of the same model; None makes one.
    """

    def __init__(
        self, model: Decoder, batch: Any, compiled: bool, learning_rate: float, clip: float,
        optimizer: Any = None,
    ) -> None:  # fmt: skip
        self._device = next(model.parameters()).device
        self._parameters = list(model.parameters())
        self._loss = torch.compile(model) if compiled else model
        # betas, epsilon and decay of optax.adamw
        self.optimizer = optimizer or torch.optim.AdamW(
            self._parameters, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4,
            fused=True,
        )  # fmt: skip
        self._clip = clip
        self._ids, self._targets = (
            torch.from_numpy(batch[name].copy()).long().to(self._device)
            for name in ("inputs", "targets")
        )
        self.losses: list[float] = []

    def __call__(self) -> None:
        with torch.autocast(self._device.type, torch.bfloat16):
            loss = self._loss(self._ids, self._targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, self._clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))  # waits
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def make(config: Any, tokens: int, device: str) -> Decoder:
    """Returns the model on a device, its weights drawn as ours are."""
    with torch.device(device):
        torch.manual_seed(0)
        model = Decoder(config, tokens)
        for p in model.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
    return model


def where() -> str:
    """Returns the device that torch has."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def peak_bytes() -> int | None:
    """Returns the most memory that torch has held on the device; None on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
