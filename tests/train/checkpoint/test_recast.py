"""Restoring a run into other moments: the next step is the one that the run would have made."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax import contrib

from mpjax.errors import ConfigError
from mpjax.optim import Blockwise, quantize_moments, store_weights, wrap
from mpjax.optim.moments.convert import is_block
from mpjax.optim.moments.low_moments import MomentState
from mpjax.precision import get_precision
from mpjax.train import init_state
from mpjax.train.checkpoint.checkpointer import Checkpointer
from mpjax.train.checkpoint.restore import restore_into

pytestmark = pytest.mark.usefixtures("fast_compile")

WARM = 40
SCHEDULE = optax.linear_schedule(0.1, 0.01, 100)
BOTH, FIRST, SECOND = ("first", "second"), ("first",), ("second",)
# name -> optimizer and the moments that it keeps
OPTIMIZERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "adam, scheduled": (optax.adam(SCHEDULE), BOTH),
    "amsgrad": (optax.amsgrad(0.1), BOTH),
    "ademamix": (contrib.ademamix(0.1), BOTH),
    "lion": (optax.lion(0.1), FIRST),
    "adafactor": (optax.adafactor(0.1, min_dim_size_to_factor=4), SECOND),
    "rmsprop, centered": (optax.rmsprop(0.1, centered=True), BOTH),
}
W = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 64)), jnp.float32)}


def grads(n: Any) -> Any:
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(5), n), (8, 64))
    return {"w": W["w"] + noise}


def low(name: str, word: str) -> Any:
    tx, kinds = OPTIMIZERS[name]
    return tx if word == "f32" else quantize_moments(tx, **dict.fromkeys(kinds, word))


def update(tx: Any, state: Any, n: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return tx.update(grads(n), state, W)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> tuple[Any, Any]:
    """The states of all optimizers after some steps, as saved in one checkpoint each storage."""

    @jax.jit
    def warm() -> Any:
        def body(states: Any, n: Any) -> Any:
            return {k: update(OPTIMIZERS[k][0], s, n)[1] for k, s in states.items()}, None

        first = {name: tx.init(W) for name, (tx, _) in OPTIMIZERS.items()}
        return jax.lax.scan(body, first, jnp.arange(WARM))[0]

    states = jax.tree.map(jnp.array, warm())
    folder = tmp_path_factory.mktemp("runs")
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(WARM, {"params": W, **states}, {})
        return states, checkpointer


@pytest.fixture(scope="module")
def steps(runs: Any) -> Any:
    """The next update of each optimizer from its float32 state, and a program for other states."""

    def all_of(word: str) -> Any:
        txs = {name: low(name, word) for name in OPTIMIZERS}
        return jax.jit(lambda states: {k: update(txs[k], s, WARM)[0] for k, s in states.items()})

    return {word: all_of(word) for word in ("f32", "int8@64")}


def fresh(word: str) -> dict[str, Any]:
    make = jax.jit(lambda: {name: low(name, word).init(W) for name in OPTIMIZERS})
    return {"params": W, **make()}


def distance(got: Any, wanted: Any) -> float:
    got, wanted = (np.asarray(x["w"], np.float64) for x in (got, wanted))
    return float(np.abs(got - wanted).mean() / np.abs(wanted).mean())


@pytest.fixture(scope="module")
def recast(runs: Any) -> tuple[dict[str, Any], list[str]]:
    return restore_into(fresh("int8@64"), runs[1])


def test_the_next_step_after_a_recast_is_the_one_without_it(
    runs: Any, steps: Any, recast: Any
) -> None:
    states, _ = runs
    wanted = steps["f32"](states)
    state = {k: s for k, s in recast[0].items() if k != "params"}
    got = steps["int8@64"](state)
    for name in OPTIMIZERS:
        # Lion takes a sign, which flips where its argument is nearly zero; no other does.
        bound = 0.05 if name != "lion" else 0.1
        assert 0 < distance(got[name], wanted[name]) < bound, name
    # The control: the same counts with moments of zero, as it was before.
    begun = {name: tx.init(W) for name, (tx, _) in OPTIMIZERS.items()}
    keep = lambda zero, x: x if jnp.issubdtype(x.dtype, jnp.integer) else zero  # noqa: E731
    moved = steps["f32"](jax.tree.map(keep, begun, states))
    for name in ("adam, scheduled", "amsgrad", "ademamix", "adafactor"):
        assert distance(moved[name], wanted[name]) > 0.15, name


def test_counts_are_kept_and_every_moment_is_named(runs: Any, recast: Any) -> None:
    states, _ = runs
    state, lines = recast
    for name, before in states.items():
        after = state[name]
        assert isinstance(after, MomentState) and int(after.draws) == 0
        plain = [x for x in jax.tree.leaves(before) if not jnp.issubdtype(x.dtype, jnp.floating)]
        kept = jax.tree.leaves(after.inner, is_leaf=is_block)
        kept = [x for x in kept if not is_block(x) and jnp.issubdtype(x.dtype, jnp.integer)]
        assert [x.tolist() for x in plain] == [x.tolist() for x in kept], name
    assert int(state["adam, scheduled"].inner[0].count) == WARM
    assert int(state["adam, scheduled"].inner[1].count) == WARM  # the schedule's
    named = {f"amsgrad/0/{part}/w: float32 -> int8@64" for part in ("mu", "nu", "nu_max")}
    assert named <= set(lines) and not [line for line in lines if "fresh" in line]


def test_back_to_float32_and_between_formats(
    runs: Any, steps: Any, recast: Any, tmp_path: Any
) -> None:
    """From codes, whose format a checkpoint tells, into float32, bfloat16 and other codes."""
    states, _ = runs
    wanted, names = steps["f32"](states), list(OPTIMIZERS)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, recast[0], {})
        wide, _ = restore_into(fresh("f32"), checkpointer)
        same, said = restore_into(fresh("int8@64"), checkpointer)
        other = {"amsgrad": low("amsgrad", "bf16"), "lion": low("lion", "int4@32")}
        other, lines = restore_into({k: tx.init(W) for k, tx in other.items()}, checkpointer)
    got = steps["f32"]({name: wide[name] for name in names})
    for name in names:
        assert 0 < distance(got[name], wanted[name]) < (0.05 if name != "lion" else 0.1), name
    raw = lambda tree: [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]  # noqa: E731
    assert raw(same) == raw(recast[0]) and said == []  # stored alike: bit for bit
    assert other["amsgrad"].inner[0].nu["w"].dtype == jnp.bfloat16
    mu = other["lion"].inner[0].mu["w"]
    assert isinstance(mu, Blockwise) and str(mu.format) == "int4@32"
    assert {"amsgrad/0/mu/w: int8@64 -> bfloat16", "lion/0/mu/w: int8@64 -> int4@32"} <= set(lines)
    np.testing.assert_allclose(
        np.asarray(other["amsgrad"].inner[0].mu["w"], np.float32),
        recast[0]["amsgrad"].inner[0].mu["w"].dequantize(), rtol=2.0**-7,
    )  # fmt: skip


def whole(optimizer: Any, word: str = "f32") -> Any:
    opt = wrap(optimizer, get_precision("fp32", moments=word))
    return init_state(jax.tree.map(jnp.array, W), opt), opt


def taken(state: Any, opt: Any, count: int) -> Any:
    step = jax.jit(opt.step)
    params, opt_state = state.params, state.opt_state
    for n in range(count):
        params, opt_state = step(grads(n), opt_state, params)
    return state._replace(params=params, opt_state=opt_state, step=state.step + count)


def test_another_optimizers_moments_begin_anew_with_their_count(tmp_path: Any) -> None:
    """Lion's mean is Adam's by name; its square is not there, so that Adam's count begins anew."""
    before = taken(*whole(optax.lion(SCHEDULE)), 4)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, before, {})
        for word in ("f32", "int8@64"):
            text = "first=f32,second=f32" if word == "f32" else word
            state, opt = whole(optax.adam(SCHEDULE), text)
            state, lines = restore_into(state, checkpointer)
            inner = state.opt_state.inner
            inner = inner.inner if isinstance(inner, MomentState) else inner
            assert int(inner[0].count) == 0 and int(state.step) == 4
            assert any("0/mu/w: begins anew, as" in line and "nu/w" in line for line in lines)
            assert np.array_equal(state.params["w"], before.params["w"])
            after = taken(state, opt, 1)
            moved = np.abs(np.asarray(after.params["w"] - state.params["w"]))
            assert moved.max() < 1.1 * float(SCHEDULE(0))  # Adam's first step, and not 3 of them


def test_a_new_weight_begins_all_moments_anew(tmp_path: Any) -> None:
    opt = wrap(optax.adam(0.1), get_precision("fp32"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, taken(*whole(optax.adam(0.1)), 4), {})
        state, lines = restore_into(init_state({**W, "head": jnp.ones(3)}, opt), checkpointer)
    assert int(state.opt_state.inner[0].count) == 0 and int(state.step) == 4
    assert not np.asarray(state.opt_state.inner[0].mu["w"]).any()
    assert "params/head: not in the checkpoint, left fresh" in lines


@pytest.mark.parametrize("word", ["int8@64", "int4@64"])
def test_a_recast_keeps_its_place_on_a_mesh(tmp_path: Any, word: str) -> None:
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    before = taken(*whole(optax.adam(0.1)), 3)
    state, _ = whole(optax.adam(0.1), word)

    def cut(x: Any) -> Any:
        spec = PartitionSpec("fsdp") if x.ndim and x.shape[0] == 8 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    state = jax.tree.map(cut, state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, jax.tree.map(cut, before), {})
        restored, _ = restore_into(state, checkpointer)
        checkpointer.save(4, restored, {})
        back, _ = restore_into(jax.tree.map(cut, whole(optax.adam(0.1))[0]), checkpointer)
    places = zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True)
    assert all(a.sharding == b.sharding for a, b in places)
    nu, wide = before.opt_state.inner[0].nu["w"], back.opt_state.inner[0].nu["w"]
    assert wide.sharding == cut(nu).sharding
    assert distance({"w": wide}, {"w": nu}) < {"int8@64": 0.02, "int4@64": 0.5}[word]


def test_codes_of_an_unknown_format_and_other_shapes_are_refused(tmp_path: Any) -> None:
    tx = quantize_moments(optax.lion(0.1), first="int8@64")
    bf16 = quantize_moments(optax.lion(0.1), first="bf16")
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": W, "o": tx.init(W)}, {})
        with pytest.raises(ConfigError, match="mu/w/codes has shape .* restore the same model"):
            other = {"w": jnp.ones((4, 64))}
            restore_into({"params": W, "o": bf16.init(other)}, checkpointer)


def test_a_checkpoint_of_an_earlier_version_is_recast_where_its_codes_are_known(
    tmp_path: Any,
) -> None:
    """It has no MomentState, and does not tell formats."""
    tx = quantize_moments(optax.lion(0.1), first="int8@64")
    state = jax.jit(tx.update)(W, tx.init(W), W)[1]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"o": state.inner}, {})
        checkpointer.read_nodes = lambda step=None: {}
        restored, _ = restore_into({"o": tx.init(W)}, checkpointer)
        got, want = restored["o"].inner[0], state.inner[0]
        assert np.array_equal(got.mu["w"].codes, want.mu["w"].codes) and got.count == 1
        other = quantize_moments(optax.lion(0.1), first="bf16").init(W)
        with pytest.raises(ConfigError, match="does not tell the format of its codes") as error:
            restore_into({"o": other}, checkpointer)
    assert "\n" not in str(error.value)


def test_weights_with_scales_and_without_are_not_taken_for_new_ones(tmp_path: Any) -> None:
    low = {"params": {"w": store_weights(W)["w"]}, "step": jnp.int32(1)}
    high = {"params": W, "step": jnp.int32(1)}
    with Checkpointer(tmp_path) as checkpointer:
        for n, (saved, now) in enumerate(((low, high), (high, low))):
            checkpointer.save(n, saved, {})
            with pytest.raises(ConfigError, match="params/w is stored with") as error:
                restore_into(now, checkpointer, n)
            assert "\n" not in str(error.value)
