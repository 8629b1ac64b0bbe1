"""What BERT is pre-trained on, both at once: masked tokens and next sentences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.tasks.labels import encoder_inputs, label_loss


@dataclasses.dataclass(frozen=True)
class MaskedLanguage:
    r"""Masked tokens and next sentences, $L = w_m L_m + w_n L_n$.

    A batch holds `labels` (B, T) for the masked tokens and `next` (B,) for the sentences.

    Args:
      masked: $w_m$.
      next: $w_n$; 0 leaves the second task out, and `next` may be absent.
      outputs: names of the model's outputs that hold the logits, (B, T, V) and (B, 2).
      loss: path whose policy both losses take.

    Raises:
      ConfigError: a weight that is negative or not finite, or both zero.

    References:
      Devlin et al. 2019, BERT, section 3.1.
    """

    masked: float = 1.0
    next: float = 1.0
    outputs: tuple[str, str] = ("masked", "next")
    loss: str = "encoder/loss"

    def __post_init__(self) -> None:
        weights = (self.masked, self.next)
        if not all(0 <= w < math.inf for w in weights) or not any(weights):
            raise ConfigError(
                f"weights: masked={self.masked:g} next={self.next:g}; give finite weights of 0 or"
                " above, one of them positive"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Name -> weight of each task that has one."""
        both = {"masked": self.masked, "next": self.next}
        return {name: weight for name, weight in both.items() if weight}

    def losses(self, model: Any) -> Callable[..., tuple[dict[str, Any], Any]]:
        """Returns a function to the loss of each task, by name and without its weight."""
        policy = model.precision.policy(self.loss)
        fields = {"masked": ("labels", self.outputs[0]), "next": ("next", self.outputs[1])}

        def losses_fn(
            params: Any, batch: Any, *, state: Any = None, key: Any = None, train: bool = False
        ) -> tuple[dict[str, Any], Any]:
            outputs, state = model.apply(
                params, encoder_inputs(batch), state=state, key=key, train=train
            )
            chosen = {name: fields[name] for name in self.weights}
            return {
                name: label_loss(outputs[output], batch[labels], policy)
                for name, (labels, output) in chosen.items()
            }, state

        return losses_fn

    def objective(self, model: Any) -> Callable[..., tuple[Any, Any]]:
        """Returns the loss function of a model, for `mpjax.train.build(objective=...)`."""
        losses_fn = self.losses(model)

        def loss_fn(params: Any, batch: Any, **options: Any) -> tuple[Any, Any]:
            losses, state = losses_fn(params, batch, **options)
            return sum(weight * losses[name] for name, weight in self.weights.items()), state

        return loss_fn

    def judge(self, model: Any) -> Callable[[Any, Sequence[Any]], dict[str, float]]:
        """Returns a function (params, batches) -> mean loss and accuracy of each task."""
        losses_fn = self.losses(model)

        @jax.jit
        def one(params: Any, batch: Any) -> Any:
            return losses_fn(params, batch)[0]

        def evaluate(params: Any, batches: Sequence[Any]) -> dict[str, float]:
            if not batches:
                raise ConfigError("batches: none to judge; name more held-out data")
            found = [jax.device_get(one(params, batch)) for batch in batches]
            return {name: float(sum(f[name] for f in found) / len(found)) for name in self.weights}

        return evaluate

    def gradient_shares(self, model: Any) -> Callable[..., dict[str, float]]:
        r"""Returns a function (params, batch) -> what each task adds to the gradient.

        The share of task $i$ is $\|w_i g_i\| / \sum_j \|w_j g_j\|$ over the parameters that all
        tasks reach; `cosine` is that between the gradients of the two, -1 where they pull
        against each other. Gradients are of the loss without dropout, with norms in float32.
        """
        losses_fn = self.losses(model)

        def gradient(name: str) -> Callable[[Any, Any], Any]:
            return jax.grad(lambda p, batch: self.weights[name] * losses_fn(p, batch)[0][name])

        @jax.jit
        def measure(params: Any, batch: Any) -> tuple[Any, Any]:
            grads = [jax.tree.leaves(gradient(name)(params, batch)) for name in self.weights]
            # Heads of one task have no gradient of the other: they are left out.
            wide = [[g.astype(jnp.float32) for g in leaves] for leaves in grads]
            shared = [
                jnp.prod(jnp.stack([jnp.any(g != 0) for g in leaf])).astype(jnp.float32)
                for leaf in zip(*wide, strict=True)
            ]
            dot = lambda a, b: sum(s * jnp.vdot(x, y) for s, x, y in zip(shared, a, b, strict=True))  # noqa: E731
            norms = [jnp.sqrt(dot(g, g)) for g in wide]
            return jnp.stack(norms), dot(wide[0], wide[-1])

        def shares(params: Any, batch: Any) -> dict[str, float]:
            norms, product = jax.device_get(measure(params, batch))
            total = float(norms.sum()) or 1.0
            found = {name: float(n) / total for name, n in zip(self.weights, norms, strict=True)}
            if len(found) > 1:
                found["cosine"] = float(product) / (float(norms.prod()) or 1.0)
            return found

        return shares
