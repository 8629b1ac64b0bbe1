"""Stochastic rounding of weights: the mean is right, the draws are fresh, replicas agree."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mpjax.optim import wrap
from mpjax.optim.gate import bits
from mpjax.precision import get_precision

N = 2**20
ULP = 2.0**-7  # of bfloat16 in [1, 2)


pytestmark = pytest.mark.usefixtures("fast_compile")


def make(update: str = "stochastic", tx: Any = None, **options: Any) -> Any:
    precision = get_precision("bf16", rules=["**=bfloat16"], update=update)
    return wrap(optax.sgd(1.0) if tx is None else tx, precision, **options)


def moved(update: str, u: float, dtype: Any = jnp.bfloat16, shape: Any = (N,)) -> np.ndarray:
    """One step from weights of 1 by u, in float64."""
    opt, w = make(update), {"w": jnp.ones(shape, dtype)}
    new, _ = jax.jit(opt.step)({"w": jnp.full(shape, np.float32(-u))}, opt.init(w), w)
    return np.asarray(new["w"], np.float64) - 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_update_is_the_update(dtype: Any, sign: int) -> None:
    """Over 2^20 draws, within 4 standard deviations of a binomial mean."""
    ulp = float(jnp.finfo(dtype).eps) / (2 if sign < 0 else 1)  # the spacing halves below 1
    u = sign * 1e-4
    out = moved("stochastic", u, dtype)
    p = abs(u) / ulp
    assert set(np.unique(out)) == {0.0, sign * ulp}
    assert abs(out.mean() - u) < 4 * ulp * np.sqrt(p * (1 - p) / N)
    assert (moved("nearest", u, dtype) == 0).all() is np.True_  # the control: nearest never moves


def test_the_mean_of_a_large_update_is_right_to_3e_5() -> None:
    """4 million draws of 1.3, 0.4 ulp above a bfloat16: one deviation is 6.4e-6 of the update."""
    u = float(np.float32(0.3))
    out = moved("stochastic", u, shape=(4, N))
    assert abs(out.mean() / u - 1) < 3e-5
    assert abs(moved("nearest", u, shape=(1,)).mean() / u - 1) > 100 * 3e-5


def test_the_expected_update_is_exact(monkeypatch: Any) -> None:
    """Each of the 2^16 patterns of the bits that decide, 16 times: u = 1e-4 to the last bit.

    With independent draws this would take 10^11 of them: their mean is uncertain by 9e-3 of the
    update after a million.
    """
    every = jnp.tile(jnp.arange(2**16, dtype=jnp.uint32) << 16, 16)
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: every.reshape(shape))
    u = 839 * 2.0**-23  # 1e-4 as float32's 1 + u holds it
    opt, w = make(), {"w": jnp.ones(N, jnp.bfloat16)}
    new, _ = opt.step({"w": jnp.full(N, np.float32(-u))}, opt.init(w), w)
    out = np.asarray(new["w"], np.float64) - 1
    assert abs(out.mean() / u - 1) < 3e-5
    assert out.mean() == u


def run(opt: Any, w: Any, steps: int, u: float = 0.3 * ULP) -> tuple[list[Any], Any]:
    """Steps by u from the same weights w each time; the weights after each, and the state."""
    state, step, out = opt.init(w), jax.jit(opt.step), []
    grads = jax.tree.map(lambda p: jnp.full(p.shape, np.float32(-u)), w)
    for _ in range(steps):
        new, state = step(grads, state, w)
        out.append(jax.tree.map(lambda x: np.asarray(bits(x)), new))
    return out, state


def agreement(a: Any, b: Any) -> float:
    """How often two roundings agree; independent ones at p = 0.3: 0.58."""
    return float((a == b).mean())


def fresh_each_step() -> bool:
    w = {"w": jnp.ones(4096, jnp.bfloat16)}
    (first, second, third), state = run(make(), w, 3)
    assert int(state.update_state["draws"]) == 3
    pairs = [(first, second), (second, third), (first, third)]
    return all(0.53 < agreement(a["w"], b["w"]) < 0.63 for a, b in pairs)


def fresh_each_leaf() -> bool:
    w = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096, jnp.bfloat16)}
    (out,), _ = run(make(), w, 1)
    return 0.53 < agreement(out["a"], out["b"]) < 0.63


def test_every_step_and_every_leaf_draws_its_own_bits() -> None:
    assert fresh_each_step() and fresh_each_leaf()


def test_the_same_key_every_step_or_every_leaf_is_caught(monkeypatch: Any) -> None:
    fold_in, seen = jax.random.fold_in, []

    def deaf(what: str) -> Any:
        def mutant(key: Any, data: Any) -> Any:
            traced = isinstance(data, jax.core.Tracer)  # the step's count; a leaf's hash is an int
            seen.append(traced)
            return key if traced is (what == "step") else fold_in(key, data)

        return mutant

    monkeypatch.setattr(jax.random, "fold_in", deaf("step"))
    assert not fresh_each_step() and fresh_each_leaf()
    monkeypatch.setattr(jax.random, "fold_in", deaf("leaf"))
    assert not fresh_each_leaf() and fresh_each_step()
    assert {True, False} == set(seen)


def test_a_weights_bits_do_not_depend_on_the_other_weights() -> None:
    one = {"m": jnp.ones(512, jnp.bfloat16)}
    more = {"a": jnp.ones(7, jnp.bfloat16), **one, "z": jnp.ones(3, jnp.bfloat16)}
    (alone,), _ = run(make(), one, 1)
    (among,), _ = run(make(), more, 1)
    assert (alone["m"] == among["m"]).all()


def test_the_seed_decides() -> None:
    w = {"w": jnp.ones(4096, jnp.bfloat16)}
    zero, again, one = (run(make(seed=s), w, 1)[0][0]["w"] for s in (0, 0, 1))
    assert (zero == again).all() and 0.53 < agreement(zero, one) < 0.63
    assert (
        make().init(w, seed=1).update_state["key"] == make(seed=1).init(w).update_state["key"]
    ).all()


@pytest.mark.parametrize("spec", [P(), P("x"), P(None, "x")], ids=["replicas", "rows", "columns"])
def test_eight_devices_draw_what_one_draws(spec: Any) -> None:
    """Replicas draw the same bits for the same weight, shards those of their part of it."""
    rng = np.random.default_rng(0)
    w = {"w": jnp.asarray(rng.normal(size=(16, 24)), jnp.bfloat16)}
    grads = {"w": jnp.asarray(rng.normal(size=(16, 24)) * 1e-3, jnp.float32)}
    opt = make(tx=optax.sgd(1.0, momentum=0.5))
    step = jax.jit(opt.step)

    def go(w: Any, grads: Any, state: Any) -> Any:
        for _ in range(3):
            w, state = step(grads, state, w)
        return w["w"]

    alone = go(w, grads, opt.init(w))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    cut = NamedSharding(mesh, spec)
    whole = NamedSharding(mesh, P())
    state = jax.tree.map(
        lambda x: jax.device_put(x, cut if x.shape == (16, 24) else whole), opt.init(w)
    )
    out = go(jax.device_put(w, cut), jax.device_put(grads, cut), state)
    assert len(out.sharding.device_set) == 8
    assert (np.asarray(bits(out)) == np.asarray(bits(alone))).all()
    shards = [np.asarray(s.data.astype(jnp.float32)) for s in out.addressable_shards]
    if spec == P():
        assert len(shards) == 8 and all((s == shards[0]).all() for s in shards)
    else:
        even = {"w": jnp.ones((16, 24), jnp.bfloat16)}
        (drawn,), _ = run(opt, even, 1)
        parts = np.split(drawn["w"], 8, axis=0 if spec == P("x") else 1)
        assert len({part.tobytes() for part in parts}) == 8  # shards draw different bits


@pytest.mark.parametrize("gate", [True, False])
def test_only_a_step_that_is_taken_counts(gate: bool) -> None:
    opt, w = make(gate=gate), {"w": jnp.ones(64, jnp.bfloat16)}
    state = opt.init(w)
    good, bad = {"w": jnp.full(64, 0.01)}, {"w": jnp.full(64, jnp.nan)}
    w1, state = opt.step(good, state, w)
    w2, after = opt.step(bad, state, w1)
    if gate:
        assert int(after.update_state["draws"]) == int(state.update_state["draws"]) == 1
        assert (bits(w2["w"]) == bits(w1["w"])).all()
        straight, replayed = opt.step(good, state, w1)[0], opt.step(good, after, w2)[0]
        assert (bits(straight["w"]) == bits(replayed["w"])).all()
    else:
        assert (
            int(after.update_state["draws"]) == 2
            and np.isnan(np.asarray(w2["w"], np.float32)).all()
        )


def test_weights_that_do_not_change_keep_their_bits() -> None:
    rng = np.random.default_rng(0)
    w = {"w": jnp.asarray(rng.normal(size=999), jnp.bfloat16), "norm": jnp.ones(3)}
    opt = make()
    out, _ = jax.jit(opt.step)(jax.tree.map(lambda p: jnp.zeros(p.shape), w), opt.init(w), w)
    assert (bits(out["w"]) == bits(w["w"])).all() and out["norm"].dtype == jnp.float32


def test_float32_weights_beside_low_ones_are_not_rounded() -> None:
    w = {"low": jnp.ones(8, jnp.bfloat16), "norm": jnp.ones(8)}
    opt = make()
    out, _ = opt.step({"low": jnp.zeros(8), "norm": jnp.full(8, 1e-4)}, opt.init(w), w)
    assert (np.asarray(out["norm"]) == np.float32(1) - np.float32(1e-4)).all()


def test_overflow_shows_as_infinity() -> None:
    w = {"w": jnp.full(4, 65504, jnp.float16)}
    out, _ = make().step({"w": jnp.full(4, -65504.0)}, make().init(w), w)
    assert np.isinf(np.asarray(out["w"])).all()


def test_nothing_rounds_but_the_bits_of_round_to(monkeypatch: Any) -> None:
    calls = []
    module = sys.modules["mpjax.optim.update_rules"]
    original = module.round_to
    monkeypatch.setattr(module, "round_to", lambda *a, **k: calls.append(a[2]) or original(*a, **k))
    w = {"w": jnp.ones(8, jnp.bfloat16)}
    make().step({"w": jnp.ones(8)}, make().init(w), w)
    assert calls == ["stochastic"]
