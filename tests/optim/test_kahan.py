"""Kahan-compensated weights, against numpy and ml_dtypes one operation at a time."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.optim import wrap
from mpjax.optim.gate import bits
from mpjax.precision import get_precision


def make(update: str = "kahan", tx: Any = None, **options: Any) -> Any:
    rules = [] if update == "none" else ["**=bfloat16"]
    precision = get_precision("bf16", rules=rules, update=update)
    return wrap(optax.sgd(1.0) if tx is None else tx, precision, **options)


def oracle(w: Any, u: Any, c: Any) -> tuple[Any, Any]:
    """One update; every operation in float32, then rounded by ml_dtypes where `low` stands."""
    f32, low = np.float32, w.dtype
    y = u - c.astype(f32)
    s = (w.astype(f32) + y).astype(low)
    gained = (s.astype(f32) - w.astype(f32)).astype(low)
    return s, (gained.astype(f32) - y).astype(low)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("how", ["jit", "one by one"])
def test_100_steps_are_numpys_bit_for_bit(dtype: Any, how: str) -> None:
    rng = np.random.default_rng(0)
    grads = rng.normal(size=(100, 300)).astype(np.float32) * 2.0**-9
    w = rng.normal(size=300).astype(dtype)
    opt, ours = make(), {"w": jnp.asarray(w)}
    state, c = opt.init(ours), np.zeros(300, dtype)
    step = jax.jit(opt.step) if how == "jit" else opt.step
    lossy = 0
    for g in grads if how == "jit" else grads[:5]:
        ours, state = step({"w": jnp.asarray(g)}, state, ours)
        w, c = oracle(w, -g, c)
        assert np.asarray(ours["w"]).tobytes() == w.tobytes()
        assert np.asarray(state.update_state["kahan"]["w"]).tobytes() == c.tobytes()
        lossy += int((c != 0).sum())
    assert state.update_state["kahan"]["w"].dtype == dtype  # 2 bytes a weight
    assert lossy > 0.9 * 300 * (100 if how == "jit" else 5)


def test_no_compensation_term_is_elided_by_the_compiler() -> None:
    """Casts alone do not survive: written with them, XLA may keep what it was to drop."""
    w = {"w": jnp.ones(256, jnp.bfloat16)}
    opt = make()
    state = opt.init(w)
    step = jax.jit(opt.step)
    text = step.lower({"w": jnp.ones(256)}, state, w).compile().as_text()
    # rounding to nearest even on bits: one mask of the dropped bits per rounding, three roundings
    assert len(re.findall(r"= u32\[256\]\S* (?:shift-left|and|or)\(", text)) > 10
    _, out = step({"w": jnp.full(256, np.float32(-1e-4))}, state, w)
    assert (np.asarray(out.update_state["kahan"]["w"], np.float32) != 0).all()


def track(update: str, steps: int = 1000) -> np.ndarray:
    """Adam-sized updates, 1e-4 of the weights, under varying gradients; weights in float64."""
    rng = np.random.default_rng(1)
    start = np.asarray(rng.uniform(0.5, 2.0, size=200), np.float32).astype(jnp.bfloat16)
    w = {"w": jnp.asarray(start, jnp.float32 if update == "none" else jnp.bfloat16)}
    signs = jnp.asarray(np.sign(rng.normal(size=200) + 0.1), jnp.float32)
    sizes = jnp.asarray(rng.uniform(0.5, 1.5, size=(steps, 200)), jnp.float32)
    opt = make(update, optax.sgd(1e-4))

    def body(carry: Any, size: Any) -> tuple[Any, None]:
        w, state = carry
        return opt.step({"w": signs * size}, state, w), None

    (w, _), _ = jax.lax.scan(body, (w, opt.init(w)), sizes)
    return np.asarray(w["w"], np.float64), np.asarray(start, np.float64)


def test_1000_steps_stay_within_an_ulp_of_float32() -> None:
    (exact, start), (kahan, _), (nearest, _) = map(track, ("none", "kahan", "nearest"))
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), np.abs(kahan)))) - 7)
    assert (np.abs(kahan - exact) <= ulp).all()
    stuck = nearest == start
    assert stuck.mean() > 0.5 and np.abs(nearest - exact).max() > 4 * ulp.max()
    assert np.abs(exact - start).min() > 0.05


def test_a_forgotten_compensation_or_a_wrong_sign_is_caught() -> None:
    """Mutants of the oracle are not what runs."""
    rng = np.random.default_rng(0)
    w0 = rng.normal(size=300).astype(jnp.bfloat16)
    u = rng.normal(size=(20, 300)).astype(np.float32) * 2.0**-9
    opt, ours = make(), {"w": jnp.asarray(w0)}
    state, step = opt.init(ours), jax.jit(opt.step)
    for row in u:
        ours, state = step({"w": jnp.asarray(-row)}, state, ours)

    def simulate(sign: float) -> Any:
        w, c = w0, np.zeros(300, jnp.bfloat16)
        for row in u:
            w, c = oracle(w, row, (c * np.asarray(sign, jnp.bfloat16)).astype(jnp.bfloat16))
        return w

    same = [np.mean(np.asarray(ours["w"]) == simulate(sign)) for sign in (1.0, 0.0, -1.0)]
    assert same[0] == 1 and max(same[1:]) < 0.8


def test_a_skipped_step_keeps_the_compensation() -> None:
    opt, w = make(), {"w": jnp.ones(64, jnp.bfloat16), "norm": jnp.ones(2)}
    state = opt.init(w)
    assert state.update_state["kahan"]["norm"] is None
    good = {"w": jnp.full(64, 1e-3), "norm": jnp.full(2, 1e-3)}
    w, state = opt.step(good, state, w)
    assert (np.asarray(state.update_state["kahan"]["w"], np.float32) != 0).all()
    after, skipped = opt.step({**good, "norm": jnp.full(2, jnp.inf)}, state, w)
    assert (bits(after["w"]) == bits(w["w"])).all()
    kept, held = (s.update_state["kahan"]["w"] for s in (skipped, state))
    assert (bits(kept) == bits(held)).all()
    assert np.asarray(w["norm"]).tolist() == [np.float32(1) - np.float32(1e-3)] * 2
