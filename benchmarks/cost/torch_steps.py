"""Steps of torch on a CPU, from weights that `save_checkpoint` wrote of ours."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks.common.turns import Step

try:
    import torch
    import torch.nn.functional as F
    import transformers
except ImportError as error:
    sys.exit(f"{error}; pip install torch transformers")

VERSIONS = (
    f"torch {torch.__version__}, transformers {transformers.__version__},"
    f" {torch.get_num_threads()} threads"
)
Loss: TypeAlias = Callable[[], Any]  # the loss of one batch
Make: TypeAlias = Callable[[Path, dict[str, Any], Callable[..., Any]], tuple[Any, Loss]]


def minilm(folder: Path, batch: dict[str, Any], ready: Callable[..., Any]) -> tuple[Any, Loss]:
    """A BERT with a head of classes, and its loss; `ready` may compile it."""
    model = transformers.BertForSequenceClassification.from_pretrained(folder).train()
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0
    data = {name: torch.from_numpy(x.astype(np.int64)) for name, x in batch.items()}
    run = ready(model)
    return model, lambda: run(
        data["ids"], attention_mask=data["keep"], labels=data["labels"]
    ).loss  # fmt: skip


def gpt(folder: Path, batch: dict[str, Any], ready: Callable[..., Any]) -> tuple[Any, Loss]:
    """A GPT-2 without dropout, and its loss."""
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids, targets = (torch.from_numpy(batch[x].astype(np.int64)) for x in ("inputs", "targets"))

    def loss(ids: Any, targets: Any) -> Any:
        logits = model(input_ids=ids, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    run = ready(loss)
    return model, lambda: run(ids, targets)


def sides(make: Make, folder: Path, batch: dict[str, Any], rate: float) -> dict[str, Step]:
    """Steps with clipping and AdamW: eager and compiled, float32 and autocast to bfloat16."""
    found = {}
    for compiled in (False, True):
        for low in (False, True):
            name = f"torch {'compiled ' * compiled}{'bf16 autocast' if low else 'fp32'}"
            model, loss = make(folder, batch, torch.compile if compiled else lambda x: x)
            found[name] = _step(model, loss, low, rate)
    return found


def _step(model: Any, loss_of: Loss, low: bool, rate: float) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)

    def run() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return run
