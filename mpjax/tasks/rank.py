r"""Ranking of items by a text: two towers, which are one encoder.

Shapes: B rows, K candidates of a row, S tokens of a candidate, D width, C items.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mpjax import ops
from mpjax.data.tokenizers.wordpiece import Example, WordPiece
from mpjax.errors import ConfigError, brief
from mpjax.models import Encoder
from mpjax.models.core.checks import field
from mpjax.ops.objective import rows_alike
from mpjax.tasks.labels import encoder_inputs, label_loss
from mpjax.tasks.metrics import ranking_scores
from mpjax.tasks.predictor import Predict, predictor, softmax
from mpjax.typing import Array, ArrayLike, Batch, Key, ModelState, Params

KINDS = ("softmax", "bpr")


@dataclasses.dataclass(frozen=True)
class Ranking:
    r"""Which item belongs to a text, such as a history: the score is a scaled cosine.

    With the encoder's outputs $u$ of the text and $v_i$ of an item, of which token types tell
    apart which is which, the score is $s_i = u \cdot v_i / (\lvert u \rvert \lvert v_i \rvert
    \tau)$. A row's candidate 0 is its target $t$. `softmax` is the mean over rows of
    $\log \sum_{i \in P} e^{s_i - \log q_i} - (s_t - \log q_t)$, where the pool $P$ holds the
    candidates of all rows but copies of $t$; with `accumulate=n` a microbatch is a pool. `bpr` is
    the mean over rows and their own other candidates of $\log (1 + e^{s_i - s_t})$. Norms and sums
    are float32 whatever the Precision.

    Args:
      kind: `softmax` or `bpr`.
      temperature: $\tau$.
      output: name of the model's output that holds the vectors (B, D).
      loss: path whose policy the loss takes; unit vectors enter their product, and scores the
        loss, in its compute dtype.

    Raises:
      ConfigError: an unknown kind, or a temperature that is not positive.

    Example:
      >>> from mpjax.models import encoder
      >>> model = encoder("bert-tiny", layers=1, width=16, heads=2, head="none", pool="mean")
      >>> objective = Ranking("bpr").objective(model)

    References:
      Rendle et al. 2009, BPR, section 4; Yi et al. 2019, Sampling-Bias-Corrected Neural Modeling
      for Large Corpus Item Recommendations, section 3.
    """

    kind: str = "softmax"
    temperature: float = 0.1
    output: str = "pooled"
    loss: str = "encoder/loss"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"ranking: unknown kind {brief(self.kind)}; known: {' '.join(KINDS)}")
        number = isinstance(self.temperature, int | float) and not isinstance(
            self.temperature, bool
        )
        if not (number and 0 < self.temperature < math.inf):
            raise ConfigError(
                f"ranking: temperature={brief(self.temperature)} is not a positive number"
            )

    def examples(
        self, pieces: WordPiece, texts: Sequence[str], targets: ArrayLike, *, longest: int
    ) -> list[Example]:
        """Returns the encoded texts, each with the number of its item as `target`.

        `mpjax.data.candidates` makes the candidates of a batch of it.

        Raises:
          ConfigError: not one number for each text, or what `WordPiece.encode` raises.
        """
        found = np.asarray(targets)
        if found.dtype.kind not in "iu" or found.shape != (len(texts),) or (found < 0).any():
            raise ConfigError(
                f"targets: {found.dtype} of shape {found.shape} for {len(texts)} texts; give the"
                " number of an item for each"
            )
        encoded = pieces.encode(texts, longest=longest)
        return [e | {"target": np.int32(i)} for e, i in zip(encoded, found, strict=True)]

    def items(self, pieces: WordPiece, texts: Sequence[str], *, longest: int) -> list[Example]:
        """Returns the encoded items, all of token type 1."""
        encoded = pieces.encode(texts, longest=longest)
        return [e | {"types": np.ones_like(e["types"])} for e in encoded]

    def objective(self, model: Encoder) -> ops.Objective:
        """Returns the objective of a model, for `mpjax.train.build(objective=...)`.

        Raises:
          ConfigError: a model whose encoder pools nothing, or has one token type only.
        """
        config = getattr(model, "config", None)
        if self.output == "pooled" and not getattr(config, "pools", True):
            raise ConfigError(
                f"ranking: the model's head {config.head!r} pools nothing; make it with"  # type: ignore[union-attr]
                " head='none'"
            )
        if getattr(config, "types", 2) < 2:
            raise ConfigError(
                "ranking: the model does not tell a text from an item; make it with types=2"
            )
        policy = model.precision.policy(self.loss)

        def vectors(outputs: dict[str, Array]) -> Array:
            # float16 squares overflow beyond 256, and a bfloat16 norm is 0.4 % off.
            x = outputs[self.output].astype(jnp.float32)
            norm = jnp.sqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)
            return (x / norm).astype(policy.compute_dtype)

        def loss(
            params: Params,
            batch: Batch,
            *,
            state: ModelState = None,
            key: Key | None = None,
            train: bool = False,
        ) -> tuple[Array, ModelState]:
            numbers = jnp.asarray(field(batch, "items", self.loss))
            keys = (None, None) if key is None else jax.random.split(key)
            found, state = model.apply(
                params, encoder_inputs(batch), state=state, key=keys[0], train=train
            )
            own, state = model.apply(
                params, _item_inputs(batch), state=state, key=keys[1], train=train
            )
            u_BD, v_ND = vectors(found), vectors(own)

            def score(equation: str, v: Array) -> Array:
                dots = jnp.einsum(equation, u_BD, v, preferred_element_type=jnp.float32)
                return dots * jnp.float32(1 / self.temperature)

            if self.kind == "bpr":
                s_BK = score("bd,bkd->bk", v_ND.reshape(*numbers.shape, -1))
                margin = (s_BK[:, 1:] - s_BK[:, :1]).astype(policy.compute_dtype)
                pairs = jax.nn.softplus(margin.astype(jnp.float32))  # a sum over the batch follows
                return jnp.mean(pairs).astype(policy.output_dtype), state
            s_BN = score("bd,nd->bn", v_ND)
            if (log_q := batch.get("log_q")) is not None:
                s_BN = s_BN - jnp.asarray(log_q).astype(jnp.float32).reshape(1, -1)
            right_B = jnp.arange(numbers.shape[0]) * numbers.shape[1]
            same_BN = numbers.reshape(1, -1) == numbers[:, :1]
            copies_BN = same_BN & (jnp.arange(numbers.size)[None] != right_B[:, None])
            s_BN = jnp.where(copies_BN, -jnp.inf, s_BN)
            return label_loss(s_BN, right_B, policy), state

        return ops.Objective(loss, rows_alike)

    def predictor(self, model: Encoder, **settings: Any) -> Predict:
        """Returns a function (params, examples) -> the vector (D,) of each; see `predictor`."""
        return predictor(model, self.output, **settings)

    def scores(self, texts: Sequence[np.ndarray], items: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the scores of all items for each text, (B, C) float64.

        Args:
          texts: vectors (D,) as `predictor` returns them.
          items: the same of the items.
        """
        u, v = (np.stack(list(side)).astype(np.float64) for side in (texts, items))
        u, v = (x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-12) for x in (u, v))
        return u @ v.T / self.temperature

    def evaluate(
        self, scores: np.ndarray, targets: ArrayLike, *, known: ArrayLike | None = None
    ) -> dict[str, float]:
        """Returns `ranking_scores`, and as `loss` the cross-entropy over all items, in nats.

        Args:
          scores: (B, C).
          targets: (B,) numbers of the right items.
          known: (B, C) bool, items that are no candidates; None is none.
        """
        found = ranking_scores(scores, targets, known=known)
        left = scores if known is None else np.where(known, -np.inf, scores)
        right = np.arange(len(left)), np.asarray(targets)
        chance = np.maximum(softmax(left)[right], np.finfo(np.float64).tiny)
        return found | {"loss": float(-np.log(chance).mean())}


def _item_inputs(batch: Batch) -> dict[str, Array]:
    """The items of all rows as an encoder reads them, (B K, S)."""
    names = ("ids", "types", "keep")
    found = {n: jnp.asarray(field(batch, f"item_{n}", "encoder")) for n in names}
    return {name: x.reshape(-1, x.shape[-1]) for name, x in found.items()}
