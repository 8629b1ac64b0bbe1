"""Optimizers and learning-rate schedules by name, as command lines offer them."""

from __future__ import annotations

import difflib
import math

import jax
import optax

from mpjax.errors import ConfigError, brief, explains_calls, is_whole
from mpjax.optim.checks import is_number
from mpjax.optim.compression.one_bit_adam import scale_by_frozen_adam
from mpjax.paths import path_name
from mpjax.typing import Params, PyTree

OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor", "one-bit-adam")
SCHEDULES = ("constant", "linear", "cosine", "wsd")


def _known(kind: str, name: str, choices: tuple[str, ...]) -> None:
    if not isinstance(name, str) or name not in choices:
        near = difflib.get_close_matches(str(name).lower(), choices, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{kind}: unknown name {brief(name)}; {hint}known: {' '.join(choices)}")


def make_schedule(name: str, lr: int | float, steps: int, warmup: int) -> optax.Schedule:
    """Returns a learning-rate schedule: linear warm-up to `lr`, then the named shape.

    Args:
      name: `constant`, `linear` (to 0), `cosine` (to 0.1 lr) or `wsd` (constant, then linear to 0
        in the last fifth).
      lr: the peak, positive.
      steps: of the whole run.
      warmup: steps of warm-up.

    Raises:
      ConfigError: unknown name, or a value out of range.

    Example:
      >>> float(make_schedule("linear", 1.0, steps=10, warmup=0)(5))
      0.5
    """
    _known("schedule", name, SCHEDULES)
    if not (is_number(lr) and 0 < lr < math.inf):
        raise ConfigError(f"lr: {brief(lr)} is no finite number above 0; give one, such as 0.001")
    if not is_whole(steps, 1):
        raise ConfigError(f"steps: {brief(steps)} is no number of steps; give at least 1")
    if not is_whole(warmup, 0) or warmup >= steps:
        raise ConfigError(
            f"warmup: {brief(warmup)} must be in 0..steps-1 = 0..{steps - 1}; change one"
        )
    rest = max(1, steps - warmup)
    down = max(1, rest // 5)
    constant = optax.constant_schedule(lr)
    main = {
        "constant": constant,
        "linear": optax.linear_schedule(lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(lr, rest, alpha=0.1),
        "wsd": optax.join_schedules(
            [constant, optax.linear_schedule(lr, 0.0, down)], [rest - down]
        ),
    }[name]
    if not warmup:
        return main
    return optax.join_schedules([optax.linear_schedule(lr / warmup, lr, warmup), main], [warmup])


def _decayed(params: Params) -> PyTree:
    """Matrices are decayed; scales, biases and tables of positions are not."""

    def is_matrix(path: jax.tree_util.KeyPath, _: object) -> bool:
        names = path_name(path).split("/")
        return names[-1] in ("kernel", "table") and "position" not in names

    decayed = jax.tree_util.tree_map_with_path(is_matrix, params)
    if not any(jax.tree.leaves(decayed)):
        raise ConfigError(
            "weight_decay: no weight is named kernel or table, so none would decay; set it to 0, or"
            " take an optax optimizer with a mask of your own"
        )
    return decayed


@explains_calls
def make_optimizer(
    name: str,
    lr: int | float,
    *,
    schedule: str = "constant",
    steps: int = 1,
    warmup: int = 0,
    weight_decay: int | float = 0.0,
) -> optax.GradientTransformation:
    """Returns a raw optax optimizer with its schedule; `mpjax.optim.wrap` takes it.

    Args:
      name: `adamw` (b1 .9, b2 .95), `sgd` (momentum .9), `lion`, `adafactor` or `one-bit-adam`
        (`adamw` whose second moment stays as it is after the warm-up, for signs of momenta).
      lr: peak learning rate.
      schedule: see `make_schedule`.
      steps: of the whole run.
      warmup: steps of warm-up.
      weight_decay: decoupled, on matrices only: leaves named `kernel` or `table`.

    Raises:
      ConfigError: unknown name, or a value out of range; at init, weight decay of no weight.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = make_optimizer("sgd", 0.1)
      >>> state = tx.init({"w": jnp.ones(1)})
    """
    _known("optimizer", name, OPTIMIZERS)
    if not (is_number(weight_decay) and 0 <= weight_decay < math.inf):
        raise ConfigError(
            f"weight_decay: {weight_decay} is no finite number of 0 or above; give one, such as 0.1"
        )
    rate = make_schedule(schedule, lr, steps, warmup)
    decay = optax.add_decayed_weights(weight_decay, mask=_decayed)
    if name == "adafactor":
        # Its own relative step sizes are off: lr means the same as for the others.
        core = optax.adafactor(rate, multiply_by_parameter_scale=False)
        if not weight_decay:
            return core
        last = optax.scale_by_learning_rate(rate)
        return optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False), optax.scale(-1.0), decay, last
        )
    scale = {
        "adamw": optax.scale_by_adam(b1=0.9, b2=0.95),
        "sgd": optax.trace(decay=0.9),
        "lion": optax.scale_by_lion(),
        "one-bit-adam": scale_by_frozen_adam(max(1, warmup), b1=0.9, b2=0.95),
    }[name]
    parts = (scale, decay) if weight_decay else (scale,)
    return optax.chain(*parts, optax.scale_by_learning_rate(rate))
