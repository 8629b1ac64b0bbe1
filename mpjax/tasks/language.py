"""Language modelling, and what is the same with weights: instructions and translation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np

from mpjax import ops
from mpjax.errors import ConfigError
from mpjax.formats.checks import batch_rows
from mpjax.models import Decoder, Recurrent, Seq2Seq
from mpjax.models.core.batch_fields import check_batch, read_batch
from mpjax.models.core.checks import each_batch, field
from mpjax.models.inference.perplexity import exp
from mpjax.typing import Batch, ModelState, Params


@dataclasses.dataclass(frozen=True)
class Language:
    """The mean cross-entropy of next tokens, as the model's own `loss` gives it.

    A decoder reads `inputs` and `targets`; `weights` of the tokens leave prompts out of the loss
    (`mpjax.data.chat.instructions`) and `keep`, or `attention_mask`, hides padding. An
    encoder-decoder reads its source too.
    """

    def objective(self, model: Decoder | Recurrent | Seq2Seq) -> ops.Objective:
        """Returns the objective of a model, for `mpjax.train.build(objective=...)`."""
        return ops.Objective.of_model(model)

    def judge(self, model: Decoder | Recurrent | Seq2Seq) -> Callable[..., dict[str, float]]:
        r"""Returns a function (params, batches) -> `loss` in nats a token and `perplexity`.

        $$\mathrm{perplexity} = \exp\Big(\sum_b n_b L_b \Big/ \sum_b n_b\Big)$$ with $n_b$ the
        weight of the targets of batch $b$.
        """
        one = jax.jit(lambda params, batch, state: model.loss(params, batch, state=state)[0])

        def evaluate(
            params: Params, batches: Iterable[Batch], state: ModelState = None
        ) -> dict[str, float]:
            total, count = 0.0, 0.0
            for raw in each_batch(batches, "judge"):
                batch_rows(raw, "judge")
                check_batch(model, raw)
                batch = read_batch(model, raw)
                weights, targets = batch.get("weights"), field(batch, "targets", "judge")
                n = float(targets.size)
                if weights is not None:  # NumPy would sum 16-bit weights in 16 bits
                    n = float(np.sum(np.asarray(weights).astype(np.float64)))
                total += n * float(one(params, batch, state))
                count += n
            if not count:
                raise ConfigError("batches: no target to judge; name more held-out data")
            loss = total / count
            return {"loss": loss, "perplexity": exp(loss)}

        return evaluate
