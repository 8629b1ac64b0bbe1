"""Update rules of weights that are stored low."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import quantize
from mpjax.optim import wrap
from mpjax.optim.gate import bits
from mpjax.precision import get_precision

SHAPES = {"a": (3, 4), "b": (5,)}
DTYPES = {"a": jnp.bfloat16, "b": jnp.float16}


pytestmark = pytest.mark.usefixtures("fast_compile")


def params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), DTYPES[k]) for k, s in SHAPES.items()}


def grads(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def weights(update: str) -> Any:
    return get_precision("bf16", rules=["**=bfloat16"] if update != "none" else [], update=update)


def test_master_weights_follow_a_float32_run_exactly() -> None:
    """The stored weights are the float32 run's, rounded to nearest even, at every step."""
    low = params()
    full = jax.tree.map(lambda p: p.astype(jnp.float32), low)
    tx = optax.adam(1e-3)
    master, plain = wrap(tx, weights("master")), wrap(tx, weights("none"))
    low_state, full_state = master.init(low), plain.init(full)
    low_step, full_step = jax.jit(master.step), jax.jit(plain.step)
    lost = 0
    for n in range(20):
        before = low
        low, low_state = low_step(grads(n), low_state, low)
        full, full_state = full_step(grads(n), full_state, full)
        for key in SHAPES:
            rounded = np.asarray(full[key]).astype(DTYPES[key])
            assert low[key].dtype == DTYPES[key]
            assert np.asarray(low[key]).tobytes() == rounded.tobytes()
            copy = low_state.update_state["master"][key]
            assert np.asarray(copy).tobytes() == np.asarray(full[key]).tobytes()
        lost += int(jnp.sum(bits(before["a"]) == bits(low["a"])))
    assert lost > 20  # most single updates do not move a bfloat16 weight


def run_adam(update: str, steps: int = 100) -> tuple[Any, Any]:
    """Adam at 1e-4 with gradient 1 on weights of 1: each update is 1e-4, half an ulp is 2^-9."""
    opt = wrap(optax.adam(1e-4), weights(update))
    w = {"w": jnp.ones(2, jnp.float32 if update == "none" else jnp.bfloat16)}

    def body(carry: Any, _: Any) -> tuple[Any, None]:
        w, state = carry
        return opt.step({"w": jnp.ones(2)}, state, w), None

    (w, state), _ = jax.lax.scan(body, (w, opt.init(w)), None, length=steps)
    return w["w"], state


def test_nearest_loses_updates_below_half_an_ulp_and_master_does_not() -> None:
    full, _ = run_adam("none")
    np.testing.assert_allclose(full, 1 - 100 * 1e-4, rtol=1e-5)
    nearest, _ = run_adam("nearest")
    assert np.array_equal(np.asarray(nearest, np.float32), [1.0, 1.0])  # the trap of NUMERICS.md
    master, state = run_adam("master")
    assert np.array_equal(state.update_state["master"]["w"], full)
    assert np.array_equal(master, np.asarray(full).astype(ml_dtypes.bfloat16))
    assert (np.asarray(master, np.float32) < 1).all()


@pytest.mark.parametrize("half_ulps", [0.99, 1.0, 1.01, 2.99, 3.0, 3.01])
def test_nearest_rounds_ties_to_even(half_ulps: float) -> None:
    opt = wrap(optax.sgd(1.0), weights("nearest"))
    w = {"w": jnp.ones(1, jnp.bfloat16)}
    step = np.float32(half_ulps * 2.0**-8)  # the ulp of [1, 2) is 2^-7
    out, _ = opt.step({"w": -jnp.full(1, step)}, opt.init(w), w)
    assert np.asarray(out["w"]) == np.float32(1 + step).astype(ml_dtypes.bfloat16)
    assert (
        float(out["w"][0])
        == 1 + {0.99: 0, 1.0: 0, 1.01: 1, 2.99: 1, 3.0: 2, 3.01: 2}[half_ulps] * 2.0**-7
    )


def test_float32_leaves_keep_no_copy() -> None:
    """A float32 weight is its own master; only low leaves get one."""
    mixed = {"low": jnp.ones(2, jnp.bfloat16), "norm": jnp.ones(2)}
    opt = wrap(optax.sgd(0.25), weights("master"))
    state = opt.init(mixed)
    assert state.update_state["master"]["norm"] is None
    assert state.update_state["master"]["low"].dtype == jnp.float32
    out, state = opt.step(jax.tree.map(lambda p: jnp.ones(2), mixed), state, mixed)
    assert {k: (v.dtype.name, v.tolist()) for k, v in out.items()} == {
        "low": ("bfloat16", [0.75, 0.75]),
        "norm": ("float32", [0.75, 0.75]),
    }
    assert jax.tree.structure(state) == jax.tree.structure(opt.init(mixed))


@pytest.mark.parametrize(
    ("update", "dtype", "message"),
    [
        ("none", jnp.bfloat16, "weights are stored in bf16, which needs an update rule; set"),
        ("none", jnp.float16, "weights are stored in f16, which needs an update rule; set"),
        ("nearest", jnp.float32, "'nearest' needs weights stored low, all are float32"),
        ("stochastic", jnp.float32, "'stochastic' needs weights stored low, all are float32"),
        ("kahan", jnp.float32, "'kahan' needs weights stored low, all are float32"),
    ],
)
def test_storage_and_update_rule_must_fit(update: str, dtype: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        wrap(optax.sgd(1.0), weights(update)).init({"w": jnp.ones(1, dtype)})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("format", "scaling", "offset"), [("int8", "row", True), ("e2m1", "nv(16)", False)]
)
def test_storage_that_no_rule_rewrites_is_refused(format: str, scaling: str, offset: bool) -> None:
    w = {"w": quantize(jnp.ones((4, 16)), format, scaling, offset=offset)}
    with pytest.raises(ConfigError, match="which no update rule rewrites; store it with tensor"):
        wrap(optax.sgd(1.0), weights("nearest")).init(w)


def test_float32_weights_are_their_own_master() -> None:
    opt = wrap(optax.sgd(0.5), weights("master"))
    w = {"w": jnp.ones(1)}
    assert opt.step({"w": jnp.ones(1)}, opt.init(w), w)[0]["w"].tolist() == [0.5]


@pytest.mark.parametrize("update", ["stochastik", "kahan,master", "master+stochastic", ""])
def test_one_known_rule_is_named(update: str) -> None:
    with pytest.raises(ConfigError, match="known: none master nearest stochastic kahan$"):
        weights(update)


@pytest.mark.parametrize("held", ["master", "nearest", "stochastic", "kahan"])
@pytest.mark.parametrize("update", ["master", "nearest", "stochastic", "kahan"])
def test_the_state_of_another_rule_is_refused(held: str, update: str) -> None:
    low = params()
    state = wrap(optax.sgd(1.0), weights(held)).init(low)
    opt = wrap(optax.sgd(1.0), weights(update))
    if held == update:
        opt.step(grads(0), state, low)
        return
    shown = "none" if held == "nearest" else held
    with pytest.raises(ConfigError) as error:
        opt.step(grads(0), state, low)
    assert str(error.value).startswith(f"update: the optimizer state is one of update={shown}, the")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("update", ["stochastic", "kahan"])
def test_a_wrapped_optimizer_inside_another_is_refused(update: str) -> None:
    inner = wrap(optax.sgd(1.0), weights("none")).as_optax()
    with pytest.raises(ConfigError, match="a part of it is wrapped already; pass the raw optax"):
        wrap(optax.chain(optax.scale(2.0), inner), weights(update)).init(params())


@pytest.mark.parametrize("update", ["stochastic", "kahan"])
def test_donated_in_a_jitted_step_with_clip(update: str) -> None:
    opt, low = wrap(optax.adam(1e-2), weights(update), clip=0.5), params()
    once, _ = jax.jit(opt.step)(grads(0), opt.init(low), low)
    donated, state = jax.jit(opt.step, donate_argnums=(1, 2))(grads(0), opt.init(low), params())
    assert all((bits(once[k]) == bits(donated[k])).all() for k in SHAPES)
    # twice the gradient is the same step after the clip; the control without is another
    doubled = jax.tree.map(lambda g: 2 * g, grads(0))
    sgd = wrap(optax.sgd(0.5), weights(update), clip=0.5)
    a, b = (jax.jit(sgd.step)(g, sgd.init(low), low)[0] for g in (grads(0), doubled))
    assert all(np.allclose(np.float32(a[k]), np.float32(b[k]), atol=2.0**-7) for k in SHAPES)
    assert state.gate.skipped == 0


@pytest.mark.parametrize("update", ["stochastic", "kahan"])
def test_a_checkpoint_goes_on_bit_for_bit(update: str, tmp_path: Any) -> None:
    from mpjax.train.checkpoint.checkpointer import Checkpointer

    opt, low = wrap(optax.adam(1e-2), weights(update)), params()
    step = jax.jit(opt.step)
    low, state = step(grads(0), opt.init(low), low)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, (low, state), {})
        abstract = jax.eval_shape(lambda: (params(), opt.init(params())))
        (low2, state2), _, _ = checkpointer.restore(abstract)
    raw = lambda t: [np.asarray(x).tobytes() for x in jax.tree.leaves(t)]  # noqa: E731
    assert raw((low2, state2)) == raw((low, state))
    assert raw(step(grads(1), state2, low2)) == raw(step(grads(1), state, low))
