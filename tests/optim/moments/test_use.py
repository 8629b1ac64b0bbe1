"""Quantised moments at work: every optimizer, exclusions, skipped steps, meshes, checkpoints."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mpjax.errors import ConfigError
from mpjax.models import decoder
from mpjax.optim import Blockwise, quantize_blocks, quantize_moments, wrap
from mpjax.optim.moments.blockwise import code_book
from mpjax.optim.moments.low_moments import MomentState
from mpjax.precision import get_precision
from mpjax.train import init_state, parse_mesh, state_shardings
from mpjax.train.checkpoint.checkpointer import Checkpointer
from tests.optim.scaled_step import scaled_step

pytestmark = pytest.mark.usefixtures("fast_compile")


def weights(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"embed": {"table": (6, 20)}, "up": {"kernel": (20, 300)}, "norm": {"scale": (20,)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def update(tx: optax.GradientTransformation) -> Any:
    def run(grads: Any, state: Any, params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return tx.update(grads, state, params)

    return jax.jit(run, donate_argnums=1)


def blocks(state: Any) -> list[Any]:
    is_block = lambda x: isinstance(x, Blockwise)  # noqa: E731
    return [x for x in jax.tree.leaves(state, is_leaf=is_block) if is_block(x)]


OPTIMIZERS = {
    "adamw": (optax.adamw(1e-2), ("first", "second")),
    "lion": (optax.lion(1e-2), ("first",)),
    "momentum": (optax.sgd(1e-2, momentum=0.9), ("first",)),
    "adafactor": (
        optax.adafactor(1e-2, min_dim_size_to_factor=16, momentum=0.9), ("first", "second"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "word"), [*((name, "int8@256") for name in OPTIMIZERS), ("adamw", "int4@128")]
)
def test_each_optimizer_steps_close_to_itself(name: str, word: str) -> None:
    tx, kinds = OPTIMIZERS[name]
    low, params = quantize_moments(tx, **dict.fromkeys(kinds, word)), weights()
    state, exact = low.init(params), tx.init(params)
    structure = jax.tree.structure(state)
    found = len(blocks(state))
    assert found >= len(kinds) * len(jax.tree.leaves(params))
    run, reference = update(low), update(tx)
    for n in range(4):
        updates, state = run(weights(n + 1), state, params)
        expected, exact = reference(weights(n + 1), exact, params)
    assert jax.tree.structure(state) == structure
    flat = [np.concatenate([x.ravel() for x in jax.tree.leaves(t)]) for t in (updates, expected)]
    error = np.abs(flat[0] - flat[1]).mean() / np.abs(flat[1]).mean()
    assert 0 < error < {"int8@256": 0.05, "int4@128": 0.5}[word]


def test_a_moment_is_the_float32_update_of_what_was_stored_stored_again() -> None:
    int8 = dict(first="int8", second="int8", rounding="nearest")
    tx, params = quantize_moments(optax.adam(0.1), **int8), weights()  # type: ignore[arg-type]
    state, run = tx.init(params), update(tx)
    f32 = np.float32
    for n in range(3):
        grads = weights(n + 1)
        m, v = (np.asarray(s["up"]["kernel"].dequantize()) for s in state.inner[0][1:])
        _, state = run(grads, state, params)
        g = np.asarray(grads["up"]["kernel"])
        for x, stored, signed in (
            (f32(0.1) * g + f32(0.9) * m, state.inner[0].mu, True),
            (f32(1 - 0.999) * g * g + f32(0.999) * v, state.inner[0].nu, False),
        ):
            x = x.reshape(20, 2, 150)  # rows of 300 are two blocks each
            absmax = np.abs(x).max(-1, keepdims=True)
            book = code_book("int8", signed)
            nearest = book[np.abs(x[..., None] / absmax[..., None] - book).argmin(-1)] * absmax
            got = np.asarray(stored["up"]["kernel"].dequantize()).reshape(x.shape)
            same = np.isclose(got, nearest, rtol=1e-5, atol=0)
            assert same.mean() > 0.999  # a fused multiply-add may tip a tie
            assert not np.allclose(got, x, rtol=1e-4)  # and it was not just kept


class _OwnState(NamedTuple):
    nu: Any


def _own() -> optax.GradientTransformation:
    """Somebody's optimizer whose nu has a sign, as a diagonal of the Hessian has."""
    return optax.GradientTransformation(
        lambda params: _OwnState(jax.tree.map(jnp.zeros_like, params)),
        lambda grads, state, params=None: (grads, _OwnState(grads)),
    )


SIGNS = {
    # optimizer -> moments of its state that are below zero after two steps
    "adam": (optax.adam(0.1), {"mu"}),
    "adan": (optax.adan(0.1), {"m", "v"}),  # v is of the gradients' differences, n their squares
    "sm3": (optax.sm3(0.1), {"nu"}),  # its mu holds sums of squares, its nu the momentum
    "ademamix": (optax.contrib.ademamix(0.1), {"m1", "m2"}),
    "prodigy": (optax.contrib.prodigy(0.1), {"exp_avg"}),
    "one's own": (_own(), {"nu"}),
}


@pytest.mark.parametrize("name", SIGNS)
def test_a_moment_that_has_a_sign_keeps_it(name: str) -> None:
    tx, signed = SIGNS[name]
    params, kinds = weights(), {"first": "int8", "second": "int8"}
    low = quantize_moments(tx, **(kinds if name != "one's own" else {"second": "int8"}))
    state, run = jax.tree.map(jnp.array, tx.init(params)), update(tx)  # Prodigy's holds params
    for n in range(2):
        _, state = run(weights(n + 1), state, params)
    # one step more, from the same numbers: the stored moment is the float32 one, rounded
    held = [jnp.array(x) for x in jax.tree.leaves(state)]
    exact = run(weights(3), state, params)[1]
    stored = low.init(params)
    is_block = lambda x: isinstance(x, Blockwise)  # noqa: E731
    flat, structure = jax.tree.flatten(stored.inner, is_leaf=is_block)
    again = [
        quantize_blocks(x, s.format, s.signed) if is_block(s) else x
        for x, s in zip(held, flat, strict=True)
    ]
    again = MomentState(jax.tree.unflatten(structure, again), jnp.int32(2))
    got = update(low)(weights(3), again, params)[1].inner
    below = set()
    leaves = jax.tree_util.tree_leaves_with_path(exact)
    for (path, x), y in zip(leaves, jax.tree.leaves(got, is_leaf=is_block), strict=True):
        if not is_block(y):
            continue
        field = next(key.name for key in reversed(path) if hasattr(key, "name"))
        top = float(jnp.max(jnp.abs(x)))
        assert np.abs(np.asarray(y.dequantize()) - x).max() <= 0.06 * top, field
        if float(jnp.min(x)) < -0.2 * top:
            below.add(field)
            assert y.signed, field
    assert below == signed


def test_what_is_kept_and_what_is_small_stays_float32() -> None:
    tx = quantize_moments(
        optax.adam(0.1), first="int8", second="bf16", keep=("**/embed",), min_size=21
    )
    state = tx.init(weights()).inner[0]
    for moment in (state.mu, state.nu):
        assert moment["embed"]["table"].dtype == moment["norm"]["scale"].dtype == jnp.float32
    assert isinstance(state.mu["up"]["kernel"], Blockwise)
    assert state.nu["up"]["kernel"].dtype == jnp.bfloat16
    everything = quantize_moments(optax.adam(0.1), first="int8", second="int8")
    assert len(blocks(everything.init(weights()))) == 6  # by default nothing is left out


@pytest.mark.parametrize(
    ("tx", "settings", "message"),
    [
        (optax.adam(0.1), dict(first="int9"), "moments: first: unknown format 'int9'; did you"),
        (optax.adam(0.1), dict(first="int8@0"), "the block '0' of 'int8@0' is not a positive"),
        (optax.adam(0.1), dict(first="int8", keep=("**/embde",)),
         "keep=**/embde matches no weight of the optimizer state; near misses: **/embed"),
        (optax.adam(0.1), dict(first="int8", keep=("**",)), "stores no moment low, because keep="),
        (optax.adam(0.1), dict(first="int8", min_size=10**6), "stores no moment low, because keep"),
        (optax.lion(0.1), dict(first="int8", second="int8"),
         "second moment is to be stored low, but this optimizer keeps none; write"
         " moments=first=int8@256 or choose another optimizer"),
        (optax.sgd(0.1), dict(first="int4"), "keeps none; set moments=f32 or choose"),
        (optax.adam(0.1), dict(keep=("**/embed",)), "but both moments are float32"),
    ],
)  # fmt: skip
def test_bad_input_is_named_in_one_line(tx: Any, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        quantize_moments(tx, **settings).init(weights())
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("moments: ")


# What the formats are good for.


def drift(word: str, steps: int = 20, again: bool = False) -> float:
    """Mean distance of weights from float32 Adam's; `again` sets the weights back each step."""
    rng, exact = np.random.default_rng(0), optax.adam(1e-3)
    first, second = ("bf16", "f32") if word == "bf16" else (word, word)
    low = quantize_moments(exact, first=first, second=second)
    w = jnp.asarray(rng.normal(size=(64, 512)) * 0.1, jnp.float32)
    a, b, state, stored, worst = w, w, exact.init(w), low.init(w), 0.0
    run, reference = update(low), update(exact)
    for _ in range(steps):
        g = jnp.asarray(rng.normal(size=w.shape) * 0.01, jnp.float32)
        step, state = reference(g, state, a)
        low_step, stored = run(g, stored, b)
        a, b = a + step, b + low_step
        worst = max(worst, float(jnp.abs(a - b).mean()))
        b = a if again else b
    return worst if again else float(jnp.abs(a - b).mean())


def test_weights_stay_near_float32_adams() -> None:
    assert 0 < drift("int8", again=True) < 6e-5  # bitsandbytes' bar
    found = [drift(word) for word in ("bf16", "int8", "fp8", "int4")]
    assert found == sorted(found) and 2 * found[0] < found[1] < found[3] / 2


def largest_step(word: str, rounding: str = "stochastic") -> float:
    """Largest Adam update, lr 1, when gradients of a tensor span four decades."""
    tx = quantize_moments(optax.adam(1.0), first=word, second=word, rounding=rounding)
    w = jnp.zeros((16, 256))
    size = jnp.asarray(10.0 ** -np.linspace(0, 4, 16), jnp.float32)[:, None]
    state, run = tx.init(w), update(tx)
    largest = 0.0
    for n in range(5):
        g = size * jax.random.normal(jax.random.key(n), w.shape)
        updates, state = run(g, state, w)
        largest = max(largest, float(jnp.abs(updates).max()))
    return largest


def test_a_linear_code_for_the_whole_tensor_blows_up_and_blocks_do_not() -> None:
    assert largest_step("f32") < 5 and largest_step("int8", "nearest") < 8
    assert largest_step("int8-linear", "nearest") > 1000  # v becomes zero where m is not
    # Rounded stochastically, a running square above zero stays above zero.
    assert max(map(largest_step, ("int8", "int4", "e4m3", "e5m2", "int8-linear"))) < 8


# In the wrapped optimizer.


def raw(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("word", ["int8@256", "int4@128", "fp8"])
def test_a_skipped_step_leaves_codes_and_absmax_bit_for_bit(word: str) -> None:
    precision = get_precision("fp32", moments=word, loss_scale="dynamic:init=64")
    opt, params = wrap(optax.adamw(0.1), precision, clip=1.0), weights()
    step = scaled_step(opt)
    params, state = step(weights(1), opt.init(params), params)
    moved, after = step(weights(2), state, params)
    assert all(a != b for a, b in zip(raw(blocks(after.inner)), raw(blocks(state.inner)),
                                      strict=True))  # fmt: skip
    bad = weights(3)
    bad["up"]["kernel"] = bad["up"]["kernel"].at[3, 4].set(jnp.nan)
    skipped_params, skipped = step(bad, state, params)
    assert raw(skipped_params) == raw(params) != raw(moved)
    assert raw(skipped.inner) == raw(state.inner)
    assert skipped.gate.skipped == 1 and skipped.loss_scale.value == 32


def test_a_checkpoint_brings_back_the_bits(tmp_path: Any) -> None:
    precision = get_precision("fp32", moments="first=int4,second=e5m2,keep=**/embed")
    opt, params = wrap(optax.adam(0.1), precision), weights()
    step = jax.jit(opt.step)
    params, state = step(weights(1), opt.init(params), params)
    whole = {"params": params, "opt_state": state}
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, whole, {})
        restored, _, _ = checkpointer.restore(jax.eval_shape(lambda: whole))
    assert jax.tree.structure(restored) == jax.tree.structure(whole) and blocks(restored)
    assert raw(restored) == raw(whole)
    again = [step(weights(2), s["opt_state"], s["params"]) for s in (whole, restored)]
    assert raw(again[0]) == raw(again[1])


# On eight devices.


@pytest.mark.parametrize("text", ["fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize("word", ["int8@256", "int4@128", "fp8"])
def test_codes_and_absmax_are_cut_with_their_weights(text: str, word: str) -> None:
    """The decoder of the experiments; nothing is computed."""
    mesh = parse_mesh(text)
    model = decoder("tiny", get_precision("fp32", moments=word), layers=2, width=128, heads=8)
    opt = wrap(optax.adamw(1e-2), model.precision)
    state = jax.eval_shape(lambda: init_state(model.init(jax.random.key(0)), opt))
    shardings = state_shardings(state, model.axes, mesh)
    parts = 4 if "data" in text else 8

    def here(x: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize

    pairs = list(zip(blocks(state.opt_state.inner), blocks(shardings.opt_state.inner), strict=True))
    assert len(pairs) == 2 * len(jax.tree.leaves(state.params))
    total = whole = 0
    for q, s in pairs:
        if len(q.shape) > 1 and q.shape[-2:] != (2, 128):  # norm scales are on every device
            assert here(q.codes, s.codes) * parts == q.codes.size * q.codes.dtype.itemsize, q.shape
        total += here(q.codes, s.codes) + here(q.absmax, s.absmax)
        whole += (q.codes.size * q.codes.dtype.itemsize) + 4 * q.absmax.size
    assert total * parts < 1.03 * whole


def test_an_update_of_whole_blocks_asks_no_other_device() -> None:
    """Rows on each device: their blocks too. The control cuts through the blocks."""
    mesh = parse_mesh("fsdp=8")
    tx = quantize_moments(optax.sgd(0.1, momentum=0.9), first="int8@256")
    w = jax.random.normal(jax.random.key(0), (16, 512))
    expected, after = jax.jit(tx.update)(w, tx.init(w), w)
    for spec, alone in ((PartitionSpec("fsdp", None), True), (PartitionSpec(None, "fsdp"), False)):
        cut = NamedSharding(mesh, spec)
        state = tx.init(w)
        shardings = jax.tree.map(
            lambda x, cut=cut: cut if x.shape == w.shape else NamedSharding(
                mesh, PartitionSpec("fsdp", None) if x.ndim else PartitionSpec()), state
        )  # fmt: skip
        run = jax.jit(tx.update, in_shardings=(cut, shardings), out_shardings=(cut, shardings))
        args = jax.device_put(w, cut), jax.device_put(state, shardings)
        program = run.lower(*args).compile()
        text = program.as_text()
        asked = [n for n in ("all-gather", "all-reduce", "all-to-all", "permute") if n in text]
        assert bool(asked) != alone, asked
        updates, moved = program(*args)
        assert np.array_equal(updates, expected) and raw(moved) == raw(after)
