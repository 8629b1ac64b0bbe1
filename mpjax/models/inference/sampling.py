"""The choice of the next token: the likeliest, or a draw after the filters.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mpjax.errors import ConfigError
from mpjax.formats.checks import check_key
from mpjax.models.inference.settings import Count, KeyLike, Number, as_count, as_number
from mpjax.typing import Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from: temperature, then the k likeliest, then top_p.

    Args:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draws among the k likeliest tokens; 0 or None among all.
      top_p: draws among the fewest likeliest tokens of probability p; 1 or None among all.

    Raises:
      ConfigError: a setting out of range, or a filter beside temperature 0, which does not draw.

    Example:
      >>> Sampling(temperature=0.0).draws, Sampling(top_p=0.9).draws
      (False, True)

    References:
      Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, section 3.1 (nucleus).
    """

    temperature: Number = 1.0
    top_k: Count = 0
    top_p: Number = 1.0

    def __post_init__(self) -> None:
        for name, read, off in (
            ("temperature", as_number, None), ("top_k", as_count, 0), ("top_p", as_number, 1.0)
        ):  # fmt: skip
            value = getattr(self, name)
            plain = off if value is None and off is not None else read(value, name)
            object.__setattr__(self, name, plain)
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(
                f"temperature: {self.temperature} must be 0 or above; 0 takes the likeliest token"
            )
        if self.top_k < 0:
            raise ConfigError(f"top_k: {self.top_k} must be 0 or above; 0 draws among all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: {self.top_p} must be in (0, 1]; 1 draws among all tokens")
        if not self.draws and (self.top_k or self.top_p < 1):
            raise ConfigError(
                f"temperature: 0 takes the likeliest token, so top_k={self.top_k} and"
                f" top_p={self.top_p} would filter nothing; raise temperature or leave them out"
            )

    @property
    def draws(self) -> bool:
        """Whether it needs a key."""
        return self.temperature > 0

    def check(self, vocabulary: int) -> None:
        """Checks the settings against a vocabulary.

        Raises:
          ConfigError: top_k beyond it.
        """
        if self.top_k > vocabulary:
            raise ConfigError(
                f"top_k: {self.top_k} is more than the {vocabulary} tokens of the model; lower it"
            )

    def need(self, key: KeyLike) -> Key:
        """Returns the key; if there is none and it does not draw, some key.

        Raises:
          ConfigError: it draws and has no key.
        """
        if key is None and self.draws:
            raise ConfigError("generate: sampling needs a key; pass key= or temperature=0")
        if key is not None:
            check_key(key, "generate")
        return jax.random.key(0) if key is None else key

    def filtered(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Returns float32 logits over the temperature, -inf for tokens that a filter excludes.

        Tokens that tie with the last included one are included.

        Example:
          >>> z = Sampling(top_p=0.6).filtered(jnp.log(jnp.array([[0.2, 0.5, 0.3]])))
          >>> jnp.isfinite(z).tolist()
          [[False, True, True]]
        """
        # In bfloat16, tokens of nearly equal logits would become equal.
        z_BV = logits_BV.astype(jnp.float32) / self.temperature
        if self.top_k:
            least_B1 = jax.lax.top_k(z_BV, self.top_k)[0][:, -1:]
            z_BV = jnp.where(z_BV < least_B1, -jnp.inf, z_BV)
        if self.top_p < 1:
            sorted_BV = -jnp.sort(-z_BV, axis=-1)
            p_BV = jax.nn.softmax(sorted_BV, axis=-1)
            before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # 0 for the first: it is always included
            taken_BV = jnp.where(before_BV < self.top_p, sorted_BV, jnp.inf)
            z_BV = jnp.where(z_BV < jnp.min(taken_BV, axis=-1, keepdims=True), -jnp.inf, z_BV)
        return z_BV

    def pick(self, logits_BV: Float[Array, "B V"], key: Key) -> Int[Array, " B"]:
        """Returns a token for each row.

        Args:
          logits_BV: of any floating dtype.
          key: of the draw; not used at temperature 0.
        """
        if not self.draws:
            return jnp.argmax(logits_BV.astype(jnp.float32), axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, self.filtered(logits_BV), axis=-1).astype(jnp.int32)
