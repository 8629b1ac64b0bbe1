"""Which token comes next: the likeliest, or a draw from what the filters leave.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mpjax.errors import ConfigError
from mpjax.formats.checks import check_key
from mpjax.models.inference.settings import Count, Number, as_count, as_number


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn: temperature first, then the k likeliest, then the nucleus.

    Args:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: draws among the k likeliest tokens; 0 or None among all.
      top_p: draws among the fewest likeliest tokens whose probabilities add up to at least p; 1 or
        None among all.

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
        # Plain numbers, for a program is kept for each of them.
        object.__setattr__(self, "temperature", as_number(self.temperature, "temperature"))
        top_k = 0 if self.top_k is None else as_count(self.top_k, "top_k")
        object.__setattr__(self, "top_k", top_k)
        top_p = 1.0 if self.top_p is None else as_number(self.top_p, "top_p")
        object.__setattr__(self, "top_p", top_p)
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

    def need(self, key: Any) -> Any:
        """Returns the key, or where none is needed any key.

        Raises:
          ConfigError: it draws and has no key.
        """
        if key is None and self.draws:
            raise ConfigError("generate: sampling needs a key; pass key= or temperature=0")
        if key is not None:
            check_key(key, "generate")
        return jax.random.key(0) if key is None else key

    def filtered(self, logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Returns float32 logits over the temperature, -inf where a filter takes a token out.

        Tokens that tie with the last one taken stay in.

        Example:
          >>> z = Sampling(top_p=0.6).filtered(jnp.log(jnp.array([[0.2, 0.5, 0.3]])))
          >>> jnp.isfinite(z).tolist()
          [[False, True, True]]
        """
        # a draw in bfloat16 would merge near-equal tokens
        z_BV = logits_BV.astype(jnp.float32) / self.temperature
        if self.top_k:
            least_B1 = jax.lax.top_k(z_BV, self.top_k)[0][:, -1:]
            z_BV = jnp.where(z_BV < least_B1, -jnp.inf, z_BV)
        if self.top_p < 1:
            sorted_BV = -jnp.sort(-z_BV, axis=-1)
            p_BV = jax.nn.softmax(sorted_BV, axis=-1)
            before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV  # the first is always taken
            taken_BV = jnp.where(before_BV < self.top_p, sorted_BV, jnp.inf)
            z_BV = jnp.where(z_BV < jnp.min(taken_BV, axis=-1, keepdims=True), -jnp.inf, z_BV)
        return z_BV

    def pick(self, logits_BV: Float[Array, "B V"], key: Any) -> Int[Array, " B"]:
        """Returns a token for each row.

        Args:
          logits_BV: of any floating dtype.
          key: of the draw; not used at temperature 0.
        """
        if not self.draws:
            return jnp.argmax(logits_BV.astype(jnp.float32), axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, self.filtered(logits_BV), axis=-1).astype(jnp.int32)
