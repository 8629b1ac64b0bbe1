"""Every optimizer of optax and optax.contrib, by name, for the pages on moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

LR = 0.02


def _mechanic() -> optax.GradientTransformation:
    return contrib.mechanize(optax.adamw(LR))


def _sam() -> optax.GradientTransformation:
    return contrib.sam(optax.adam(LR), optax.chain(contrib.normalize(), optax.sgd(0.01)), 2)


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    # optax
    "adabelief": lambda: optax.adabelief(LR),
    "adadelta": lambda: optax.adadelta(1.0),
    "adafactor": lambda: optax.adafactor(LR, min_dim_size_to_factor=8),
    "adafactor, momentum": lambda: optax.adafactor(LR, min_dim_size_to_factor=8, momentum=0.9),
    "adagrad": lambda: optax.adagrad(0.1),
    "adam": lambda: optax.adam(LR),
    "adam, nesterov": lambda: optax.adam(LR, nesterov=True),
    "adam, MultiSteps": lambda: optax.MultiSteps(optax.adam(LR), 2).gradient_transformation(),
    "adamax": lambda: optax.adamax(LR),
    "adamaxw": lambda: optax.adamaxw(LR),
    "adamw": lambda: optax.adamw(LR),
    "adan": lambda: optax.adan(LR),
    "amsgrad": lambda: optax.amsgrad(LR),
    "fromage": lambda: optax.fromage(0.01),
    "lamb": lambda: optax.lamb(LR),
    "lars": lambda: optax.lars(LR),
    "lbfgs": lambda: optax.lbfgs(LR, linesearch=None),
    "lion": lambda: optax.lion(0.01),
    "nadam": lambda: optax.nadam(LR),
    "nadamw": lambda: optax.nadamw(LR),
    "noisy_sgd": lambda: optax.noisy_sgd(LR, key=0),
    "novograd": lambda: optax.novograd(0.2),
    "optimistic_adam": lambda: optax.optimistic_adam(LR),
    "optimistic_adam_v2": lambda: optax.optimistic_adam_v2(LR),
    "optimistic_gradient_descent": lambda: optax.optimistic_gradient_descent(LR),
    "polyak_sgd": lambda: optax.polyak_sgd(0.1),
    "radam": lambda: optax.radam(LR),
    "rmsprop": lambda: optax.rmsprop(LR),
    "rmsprop, momentum": lambda: optax.rmsprop(0.005, momentum=0.9),
    "rmsprop, bias correction": lambda: optax.rmsprop(LR, bias_correction=True),
    "rmsprop, centered": lambda: optax.rmsprop(LR, centered=True),
    "rmsprop, centered, momentum": lambda: optax.rmsprop(0.005, centered=True, momentum=0.9),
    "rmsprop, centered, bias correction": lambda: optax.rmsprop(
        LR, centered=True, bias_correction=True
    ),
    "rprop": lambda: optax.rprop(0.01),
    "sgd": lambda: optax.sgd(LR),
    "sgd, momentum": lambda: optax.sgd(LR, momentum=0.9),
    "sgd, nesterov": lambda: optax.sgd(LR, momentum=0.9, nesterov=True),
    "sign_sgd": lambda: optax.sign_sgd(0.01),
    "signum": lambda: optax.signum(0.01),
    "sm3": lambda: optax.sm3(0.1),
    "yogi": lambda: optax.yogi(LR),
    "ema of gradients": lambda: optax.chain(optax.ema(0.9), optax.sgd(LR)),
    # optax.contrib
    "acprop": lambda: contrib.acprop(LR),
    "ademamix": lambda: contrib.ademamix(LR),
    "simplified_ademamix": lambda: contrib.simplified_ademamix(0.002),
    "adopt": lambda: contrib.adopt(LR),
    "cocob": lambda: contrib.cocob(),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(),
    "dog": lambda: contrib.dog(),
    "dowg": lambda: contrib.dowg(),
    "galore": lambda: contrib.galore(LR, rank=4),
    "madgrad": lambda: contrib.madgrad(LR),
    "mechanize": _mechanic,
    "momo": lambda: contrib.momo(LR),
    "momo_adam": lambda: contrib.momo_adam(LR),
    "muon": lambda: contrib.muon(LR),
    "prodigy": lambda: contrib.prodigy(),
    "reduce_on_plateau": lambda: optax.chain(optax.adam(LR), contrib.reduce_on_plateau()),
    "sam": _sam,
    "schedule_free_adamw": lambda: contrib.schedule_free_adamw(LR),
    "schedule_free_sgd": lambda: contrib.schedule_free_sgd(LR),
    "sophia": lambda: contrib.sophia(LR),
    # what changes an optimizer
    "lookahead": lambda: optax.lookahead(optax.adam(LR), 5, 0.5),
    "masked": lambda: optax.masked(optax.adam(LR), {"w": True, "b": False}),
    "partition": lambda: optax.partition(
        {"a": optax.adam(LR), "b": optax.sgd(LR, momentum=0.9)}, {"w": "a", "b": "b"}
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=LR),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(LR), 3),
}

SHAPES = {"w": (16, 40), "b": (40,)}
KINDS = ("first,second", "first", "second")


def problem(spread: float = 1.0) -> tuple[Any, Any, Any]:
    """A quadratic with noisy gradients: its weights, its loss, the noise of a step.

    Args:
      spread: decades that the curvatures of the weights span.
    """
    rng = np.random.default_rng(0)
    h = {k: jnp.asarray(10 ** rng.uniform(-spread, 0, s), jnp.float32) for k, s in SHAPES.items()}
    end = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
    start = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}

    def loss(w: Any) -> Any:
        terms = jax.tree.map(lambda w, e, h: jnp.sum(h * (w - e) ** 2) / 2, w, end, h)
        return sum(jax.tree.leaves(terms))

    def noise(step: Any) -> Any:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), step), 2)
        return {
            k: 0.3 * h[k] * jax.random.normal(key, s)
            for key, (k, s) in zip(keys, SHAPES.items(), strict=True)
        }

    return start, loss, noise


def step_of(tx: Any, loss: Any, noise: Any) -> Any:
    """Returns `step(weights, state, number) -> weights, state, update`."""
    tx = optax.with_extra_args_support(tx)

    def step(w: Any, state: Any, number: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(w)
        grads = jax.tree.map(jnp.add, grads, noise(number))
        extra = dict(value=value, grad=grads, value_fn=loss, obj_fn=loss)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = tx.update(grads, state, w, **extra)
            return optax.apply_updates(w, updates), state, updates

    return step
