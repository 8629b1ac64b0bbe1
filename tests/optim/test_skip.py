"""A skipped step changes nothing but the loss scale and the counters; as_optax is step, bitwise."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.optim import Optimizer, ScaledGradients, apply_updates, wrap
from mpjax.optim.gate import bits
from mpjax.precision import get_precision

SCHEDULE = optax.linear_schedule(0.1, 0.01, 10)
OPTIMIZERS = {
    "adamw": optax.adamw(SCHEDULE, weight_decay=0.1),
    "momentum": optax.sgd(SCHEDULE, momentum=0.9),
    "lion": optax.lion(SCHEDULE),
    "adafactor": optax.adafactor(SCHEDULE, min_dim_size_to_factor=2, momentum=0.9),
}
MOMENTS = {"adamw": "bf16", "momentum": "first=bf16", "lion": "first=bf16", "adafactor": "bf16"}
CASES = [
    ("adamw", "none", False),
    ("adamw", "nearest", True),
    ("adamw", "master", False),
    ("momentum", "master", True),
    ("lion", "nearest", False),
    ("adafactor", "master", True),
    ("adamw", "stochastic", True),
    ("momentum", "stochastic", False),
    ("adamw", "kahan", False),
    ("lion", "kahan", True),
]
# -0.0, a quiet NaN with a payload, a signalling NaN, -inf and a subnormal number.
SPECIAL = {
    "float32": np.array([0x80000000, 0x7FC01234, 0xFFA00001, 0xFF800000, 0x00000001], np.uint32),
    "bfloat16": np.array([0x8000, 0x7FC3, 0xFF81, 0xFF80, 0x0001], np.uint16),
    "float16": np.array([0x8000, 0x7E13, 0xFD01, 0xFC00, 0x0001], np.uint16),
}


pytestmark = pytest.mark.usefixtures("fast_compile")


def make(name: str, update: str, low: bool, clip: float | None = 1.0) -> Optimizer:
    moments = MOMENTS[name] if low else "f32"
    rules = [] if update == "none" else ["**=bfloat16"]
    precision = get_precision(
        "fp32", rules=rules, update=update, moments=moments, loss_scale="dynamic:init=64"
    )
    return wrap(OPTIMIZERS[name], precision, clip=clip)


def weights(update: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    dtypes = [jnp.float32] * 3 if update == "none" else [jnp.bfloat16, jnp.float16, jnp.float32]
    return {
        key: jnp.asarray(rng.normal(size=(2, 4)), dtype)
        for key, dtype in zip("abc", dtypes, strict=True)
    }


def gradients(seed: int, bad: tuple[int, int, float] | None = None) -> ScaledGradients:
    rng = np.random.default_rng(seed)
    grads = {key: jnp.asarray(rng.normal(size=(2, 4)), jnp.float32) for key in "abc"}
    if bad is not None:
        grads["b"] = grads["b"].at[bad[:2]].set(bad[2])
    return ScaledGradients(grads)


def poison(tree: Any) -> Any:
    """Puts the special bit patterns into the first numbers of every leaf."""

    def leaf(x: Any) -> Any:
        if x.dtype.name not in SPECIAL or x.size < 5:
            return x
        raw = np.asarray(x).view(SPECIAL[x.dtype.name].dtype).copy()
        raw.reshape(-1)[:5] = SPECIAL[x.dtype.name]
        return jax.lax.bitcast_convert_type(jnp.asarray(raw), x.dtype)

    return jax.tree.map(leaf, tree)


def raw(tree: Any) -> list[bytes]:
    floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    return [np.asarray(bits(x) if floating(x) else x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("name", "update", "low"), CASES)
def test_a_skipped_step_is_bit_identical(name: str, update: str, low: bool) -> None:
    opt, params = make(name, update, low), weights(update)
    step = jax.jit(opt.step)
    params, state = step(gradients(1), opt.init(params), params)
    # The control: a finite step moves the weights and every part of the optimizer's state.
    after, moved = step(gradients(2), state, params)
    assert all(a != b for a, b in zip(raw(after), raw(params), strict=True))
    changed = [a != b for a, b in zip(raw(moved.inner), raw(state.inner), strict=True)]
    assert sum(changed) >= len(changed) - 2 * len(params)  # adafactor has unused placeholders
    assert raw(moved.update_state) != raw(state.update_state) or update in ("none", "nearest")

    params = poison(params)
    state = state._replace(inner=poison(state.inner), update_state=poison(state.update_state))
    for bad in (jnp.nan, jnp.inf):
        after, skipped = step(gradients(3, (1, 2, bad)), state, params)
        assert raw(after) == raw(params)
        assert raw(skipped.inner) == raw(state.inner)
        assert raw(skipped.update_state) == raw(state.update_state)
        assert jax.tree.structure(skipped) == jax.tree.structure(state)
        assert skipped.loss_scale.value == state.loss_scale.value / 2
        assert skipped.gate.skipped == state.gate.skipped + 1
        assert skipped.gate.bad_leaf == 1


def plain_where(finite: Any, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def multiply(finite: Any, new: Any, old: Any) -> Any:
    """The mutant that adds finite * (new - old): NaN and -0.0 do not survive it."""

    def leaf(a: Any, b: Any) -> Any:
        return b + finite.astype(a.dtype) * (a - b)

    return jax.tree.map(leaf, new, old)


def keep_state(finite: Any, new: Any, old: Any) -> Any:
    """The mutant that protects the weights and lets the optimizer's state run on."""
    params, updates, inner, copies = plain_where(finite, new, old)
    return params, updates, new[2], copies


BEFORE_0_12 = pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="XLA keeps the bits there")


@pytest.mark.parametrize(
    "mutant", [pytest.param(plain_where, marks=BEFORE_0_12), multiply, keep_state]
)
def test_other_ways_to_skip_are_told_apart(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opt, params = make("adamw", "nearest", True), poison(weights("nearest"))
    state = opt.init(params)
    grads = ScaledGradients({**gradients(3).tree, "b": jnp.full((2, 4), jnp.nan)})
    after, skipped = jax.jit(opt.step)(grads, state, params)
    assert raw(after) + raw(skipped.inner) == raw(params) + raw(state.inner)
    monkeypatch.setattr(sys.modules["mpjax.optim.wrap"], "select", mutant)
    after, skipped = jax.jit(opt.step)(grads, state, params)
    assert raw(after) + raw(skipped.inner) != raw(params) + raw(state.inner)


@pytest.mark.parametrize(("name", "update", "low"), CASES)
def test_as_optax_gives_the_weights_of_step_bit_for_bit(name: str, update: str, low: bool) -> None:
    """One operation at a time, so that no product is fused into a sum and rounded once less."""
    opt, params = make(name, update, low), weights(update)
    tx = opt.as_optax()
    state = opt.init(params)
    assert raw(tx.init(params)) == raw(state)
    for n in range(3):
        grads = gradients(n, (0, 0, jnp.nan) if n == 2 else None)
        if n == 2:
            params = poison(params)
            state = state._replace(update_state=poison(state.update_state))
        updates, optax_state = tx.update(grads, state, params)
        assert {u.dtype.name for u in jax.tree.leaves(updates)} == {"float32"}
        ours, state = opt.step(grads, state, params)
        theirs = apply_updates(params, updates)
        assert raw(theirs) == raw(ours)
        assert raw(optax_state) == raw(state)
        assert (raw(ours) == raw(params)) is (n == 2)  # skipped: all special numbers stay
        params = ours
    assert all((np.asarray(u) == 0).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(("name", "update", "low"), CASES[:3])
def test_as_optax_in_jit_differs_by_one_rounding(name: str, update: str, low: bool) -> None:
    opt, params = make(name, update, low), weights(update)
    step, change, add = jax.jit(opt.step), jax.jit(opt.as_optax().update), jax.jit(apply_updates)
    state = opt.init(params)
    for n in range(4):
        grads = gradients(n, (0, 0, jnp.nan) if n == 3 else None)
        if n == 3:
            params = poison(params)
        updates, optax_state = change(grads, state, params)
        ours, state = step(grads, state, params)
        theirs = add(params, updates)
        assert raw(optax_state.gate) == raw(state.gate)
        if n == 3:
            assert raw(theirs) == raw(ours) == raw(params)
            continue
        for key in params:
            ulp = np.spacing(np.abs(np.asarray(params[key], np.float32)) + np.float32(0.1))
            gap = np.asarray(ours[key], np.float32) - np.asarray(theirs[key], np.float32)
            assert (np.abs(gap) <= ulp).all()
        params = ours


def test_a_delta_of_plus_zero_would_lose_the_sign() -> None:
    w = jnp.array([-0.0, 1.0])
    assert np.signbit(apply_updates(w, jnp.array([-0.0, -0.0]))).tolist() == [True, False]
    assert np.signbit(apply_updates(w, jnp.array([0.0, 0.0]))).tolist() == [False, False]


def test_the_one_exception_to_as_optax_heals_at_the_next_step() -> None:
    """A master weight that shrinks from 1 to 2^-30 in a step: no float32 delta reaches it."""
    precision = get_precision("fp32", rules=["**=bfloat16"], update="master")
    opt = wrap(optax.sgd(1.0), precision)
    tx, start = opt.as_optax(), {"w": jnp.ones(1, jnp.bfloat16)}
    state = opt.init(start)._replace(update_state={"master": {"w": jnp.full(1, 1 + 2.0**-23)}})
    grads = {"w": jnp.full(1, 1.0)}
    ours, ours_state = opt.step(grads, state, start)
    updates, _ = tx.update(grads, state, start)
    theirs = apply_updates(start, updates)
    error = abs(float(theirs["w"][0]) - float(ours["w"][0]))
    assert float(ours["w"][0]) == 2.0**-23
    assert error <= 2.0**-24
    grads = {"w": jnp.full(1, -0.3)}
    ours, _ = opt.step(grads, ours_state, ours)
    updates, _ = tx.update(grads, ours_state, theirs)
    assert raw(apply_updates(theirs, updates)) == raw(ours)
