"""Weights stored in fp8: what the scales do, what the view is, how update rules write them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mpjax.errors import ConfigError
from mpjax.formats import Quantized
from mpjax.models import decoder
from mpjax.ops import rows_alike
from mpjax.optim import store_weights, weight_view, wrap
from mpjax.optim.gate import bits
from mpjax.precision import get_precision
from mpjax.train import build, init_state, make_train_step
from mpjax.train.report.memory import bytes_per_parameter
from mpjax.train.sharding import state_shardings

pytestmark = pytest.mark.usefixtures("fast_compile")

RULES = ("master", "nearest", "stochastic", "kahan")


def make(update: str, tx: Any = None, **options: Any) -> Any:
    precision = get_precision("bf16", rules=["**=bfloat16"], update=update)
    return wrap(optax.sgd(1.0) if tx is None else tx, precision, **options)


def weights(seed: int = 0, rows: int = 8, columns: int = 48) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    up = rng.normal(size=(rows, columns)) * 2.0 ** rng.integers(-9, 4, size=(rows, 1))
    up[3] = 0.0
    return {"mlp": {"up": jnp.asarray(up, jnp.float32)}, "norm": jnp.ones(5)}


def gradients(seed: int, size: float = 1.0) -> Any:
    rng = np.random.default_rng(100 + seed)
    w = weights()
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * size, jnp.float32), w)


def raw(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize(("format", "dtype"), [("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2")])
def test_a_row_is_float8_times_a_power_of_two(format: str, dtype: str) -> None:
    w = weights()
    q = store_weights(w, format, where="mlp")["mlp"]["up"]
    x = np.asarray(w["mlp"]["up"], np.float64)
    top = float(ml_dtypes.finfo(dtype).max)
    amax = np.abs(x).max(axis=1, keepdims=True)
    scale = np.where(amax == 0, 1.0, 2.0 ** np.ceil(np.log2(np.maximum(amax, 1e-30) / top)))
    expected = (x / scale).astype(np.float32).astype(dtype)
    assert q.values.dtype.name == dtype and q.values.nbytes == x.size
    assert np.array_equal(q.scales, scale)
    assert np.asarray(q.values).tobytes() == expected.tobytes()
    view = weight_view({"w": q, "n": w["norm"]})
    assert np.array_equal(view["w"], expected.astype(np.float64) * scale)
    assert view["n"] is w["norm"] and view["w"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("update", "scaling"),
    [*((update, "row") for update in RULES),
     *(("stochastic", s) for s in ("tensor", "block(1x32)", "block(4x32)", "mx(32)"))],
)  # fmt: skip
def test_without_a_gradient_no_bit_moves(update: str, scaling: str) -> None:
    """Nor do scales, wherever in its range a group's largest number has come to lie."""
    opt = make(update)
    params = store_weights(weights(), scaling=scaling, where="mlp")
    state = opt.init(params)
    step = jax.jit(opt.step)
    zero = jax.tree.map(jnp.zeros_like, gradients(0))
    for n in range(6):
        # shrink and grow the groups, so that scales change and largest numbers lie anywhere
        grads = jax.tree.map(lambda w, n=n: w * (0.45, -0.6, 0.3)[n % 3], weight_view(params))
        before = params
        params, state = step(grads, state, params)
        assert raw(params) != raw(before)
        if update == "kahan":  # what is still owed would be paid now
            owed = jax.tree.map(jnp.zeros_like, state.update_state)
            state = state._replace(update_state=owed)
        if update == "master":  # the master lies between two stored numbers: nearest again
            state = opt.init(params)
        after, _ = step(zero, state, params)
        assert raw(after) == raw(params), n


def test_a_new_scale_at_every_step_would_move_bits() -> None:
    """The control: the scale that fits best is not the one with which a group was rounded."""
    x = jnp.array([[225.0, 3.0]])  # rounds to 224, which fits at half the scale
    q = store_weights({"w": x})["w"]
    assert q.scales.item() == 1.0 and np.float32(q.values).tolist() == [[224.0, 3.0]]
    again = store_weights({"w": q.dequantize()})["w"]
    assert again.scales.item() == 0.5 and raw(again) != raw(q)
    opt = make("nearest")
    kept, _ = opt.step({"w": jnp.zeros((1, 2))}, opt.init({"w": q}), {"w": q})
    assert raw(kept["w"]) == raw(q)


@pytest.mark.parametrize("update", RULES)
def test_scales_follow_their_rows(update: str) -> None:
    """A row that grows 2^6 times does not saturate; one that shrinks does not underflow."""
    opt, params = make(update), store_weights(weights(), where="mlp")
    old = params["mlp"]["up"]
    wanted = np.asarray(old.dequantize()) * np.float32([[64.0], [1 / 64]] * 4)
    grads = {"mlp": {"up": old.dequantize() - wanted}, "norm": jnp.zeros(5)}
    new, _ = jax.jit(opt.step)(grads, opt.init(params), params)
    q = new["mlp"]["up"]
    amax = np.abs(wanted).max(axis=1, keepdims=True)
    ratio = amax[amax > 0] / np.asarray(q.scales)[amax > 0]
    assert ((ratio <= 448) & (ratio >= 112)).all()
    error = np.abs(np.asarray(q.dequantize()) - wanted)
    spacing = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(wanted), 1e-30))) - 3)
    assert (error <= np.maximum(spacing, np.asarray(q.scales) * 2.0**-9)).all()
    assert not np.array_equal(q.scales, old.scales)


def test_nearest_and_master_against_ml_dtypes() -> None:
    """20 steps; a master's stored weights are the rounded float32 run's at every step."""
    params = store_weights(weights(), where="mlp")
    master, plain = make("master"), wrap(optax.sgd(1.0), get_precision("bf16"))
    low, full = params, weight_view(params)
    low_state, full_state = master.init(low), plain.init(full)
    step, full_step = jax.jit(master.step), jax.jit(plain.step)
    for n in range(20):
        low, low_state = step(gradients(n, 0.01), low_state, low)
        full, full_state = full_step(gradients(n, 0.01), full_state, full)
        q = low["mlp"]["up"]
        x = np.asarray(full["mlp"]["up"])
        expected = (x / np.asarray(q.scales)).astype(ml_dtypes.float8_e4m3fn)
        assert np.asarray(q.values).tobytes() == expected.tobytes()
        assert np.asarray(low_state.update_state["master"]["mlp"]["up"]).tobytes() == x.tobytes()
        assert np.array_equal(low["norm"], full["norm"])


def test_stochastic_moves_where_nearest_does_not() -> None:
    """The mean over 2^16 weights of 1 after a step of 1e-3; the spacing is 2^-3."""
    n = 2**16
    w = store_weights({"w": jnp.ones((16, n // 16))})
    grads = {"w": jnp.full((16, n // 16), np.float32(-1e-3))}
    means = {}
    for update in ("nearest", "stochastic"):
        opt = make(update)
        new, _ = jax.jit(opt.step)(grads, opt.init(w), w)
        means[update] = float(np.asarray(new["w"].dequantize(), np.float64).mean() - 1)
    p = 1e-3 * 8
    assert means["nearest"] == 0
    assert abs(means["stochastic"] - 1e-3) < 4 / 8 * np.sqrt(p * (1 - p) / n)


def test_kahan_stays_near_float32_and_nearest_is_stuck() -> None:
    rng = np.random.default_rng(0)
    start = {"w": jnp.asarray(rng.uniform(0.5, 2, size=(4, 32)), jnp.float32)}
    sizes = jnp.asarray(rng.uniform(5e-4, 1.5e-3, size=(300, 4, 32)), jnp.float32)

    def run(update: str | None) -> np.ndarray:
        params = store_weights(start)
        opt = make(update) if update else wrap(optax.sgd(1.0), get_precision("bf16"))
        params = params if update else weight_view(params)

        def body(carry: Any, g: Any) -> tuple[Any, None]:
            w, state = carry
            return opt.step({"w": g}, state, w), None

        (w, state), _ = jax.lax.scan(body, (params, opt.init(params)), sizes)
        if update == "kahan":
            assert state.update_state["kahan"]["w"].dtype == jnp.bfloat16
        return np.asarray(weight_view(w)["w"], np.float64)

    exact, kahan, nearest = run(None), run("kahan"), run("nearest")
    ulp = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), np.abs(kahan)))) - 3)
    ulp = np.maximum(ulp, 2.0**-9 * 2.0**-7)  # subnormals of the row's scale
    assert (np.abs(kahan - exact) <= ulp).all()
    assert np.array_equal(nearest, weight_view(store_weights(start))["w"])
    assert np.abs(exact - nearest).max() > 0.3


@pytest.mark.parametrize("update", RULES)
def test_a_skipped_step_moves_no_bit(update: str) -> None:
    opt = make(update, optax.adam(1e-2), clip=1.0)
    params = store_weights(weights(), where="mlp")
    step = jax.jit(opt.step)
    params, state = step(gradients(0), opt.init(params), params)
    bad = gradients(1)
    bad["norm"] = bad["norm"].at[2].set(jnp.nan)
    after, skipped = step(bad, state, params)
    assert raw(after) == raw(params)
    assert raw(skipped.update_state) == raw(state.update_state) and raw(skipped.inner) == raw(
        state.inner
    )
    assert skipped.gate.skipped == 1
    moved, _ = step(gradients(1), state, params)
    assert raw(moved) != raw(params)
    # and the gradient is named by the weight's path, though a weight here has several arrays
    stuck = wrap(optax.sgd(1.0), opt.precision, patience=1)
    _, state = stuck.step(bad, stuck.init(params), params)
    with pytest.raises(Exception, match=r"^norm: gradient is not finite"):
        stuck.check_alive(state, params)


def loss_fn(params: Any, batch: Any, *, state: Any, key: Any, train: bool) -> Any:
    del key, train
    return jnp.mean(jnp.square(batch["x"] @ params["mlp"]["up"] - batch["y"])), state


def regression() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    true = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
    params = {"mlp": {"up": jnp.zeros((8, 16))}, "norm": jnp.ones(5)}
    return {"x": x, "y": x @ true}, store_weights(params, where="mlp")


def test_a_train_step_learns_through_the_view(tmp_path: Any) -> None:
    """Donated and accumulating; nearest stalls where stochastic goes on; restored bit for bit."""
    from mpjax.train.checkpoint.checkpointer import Checkpointer

    batch, _ = regression()
    losses = {}
    for update in ("nearest", "stochastic"):
        opt = make(update, optax.adam(3e-3))
        step = make_train_step(loss_fn, opt, accumulate=2, count=rows_alike)
        state = init_state(regression()[1], opt)
        for _ in range(300):
            state, metrics = step(state, batch)
        losses[update] = float(metrics["loss"])
    assert losses["stochastic"] < 0.3 * losses["nearest"]
    assert isinstance(state.params["mlp"]["up"], Quantized)
    assert bytes_per_parameter(state) < 1 + 8 + 5 * 4 + 1  # values, Adam, and little else
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        abstract = jax.eval_shape(lambda: init_state(regression()[1], opt))
        restored, _, _ = checkpointer.restore(abstract)
    assert raw(restored) == raw(state)
    assert raw(step(restored, batch)[0]) == raw(step(state, batch)[0])


@pytest.mark.parametrize("update", RULES)
def test_eight_devices_store_what_one_stores(update: str) -> None:
    """Values are cut like the weight, scales are whole; one amax over all shards."""
    opt = make(update, optax.sgd(0.5, momentum=0.9))
    params = store_weights(weights(), where="mlp")
    mesh = jax.make_mesh((1, 8, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    state = init_state(params, opt)
    axes = {"mlp": {"up": (None, "embed")}, "norm": (None,)}
    cut = state_shardings(state, axes, mesh)
    assert cut.params["mlp"]["up"].values.spec == P(None, "fsdp")
    assert cut.params["mlp"]["up"].scales.spec == P()
    assert cut.opt_state.inner[0].trace["mlp"]["up"].spec == P(None, "fsdp")
    if update in ("master", "kahan"):
        assert cut.opt_state.update_state[update]["mlp"]["up"].spec == P(None, "fsdp")
    step = jax.jit(lambda g, s: opt.step(g, s.opt_state, s.params))
    whole = NamedSharding(mesh, P())
    spread = jax.device_put(state, cut)
    for n in range(3):
        grads = gradients(n, 0.1)
        params, opt_state = step(grads, state)
        state = state._replace(params=params, opt_state=opt_state)
        placed = {
            "mlp": {"up": jax.device_put(grads["mlp"]["up"], cut.params["mlp"]["up"].values)},
            "norm": jax.device_put(grads["norm"], whole),
        }
        params, opt_state = step(placed, spread)
        spread = jax.device_put(spread._replace(params=params, opt_state=opt_state), cut)
        assert raw(spread) == raw(state)
    shard = spread.params["mlp"]["up"].values.addressable_shards[0].data
    assert shard.shape == (8, 6) and len(spread.params["norm"].sharding.device_set) == 8


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "bfloat16"}, "bfloat16 is no 8-bit floating-point format that JAX stores"),
        ({"format": "int8"}, "int8 is no 8-bit floating-point format"),
        ({"format": "e3m2"}, "e3m2 is no 8-bit floating-point format"),
        ({"format": "e4m3x"}, "unknown name 'e4m3x'"),
        ({"scaling": "none"}, "scaling=none has no scales that an update can renew"),
        ({"scaling": "nv(16)"}, "scaling=nv(16) has no scales that an update can renew"),
        ({"scaling": "rows"}, "scaling: unknown 'rows'"),
        ({"where": "mlpp"}, "'mlpp' matches no weight; near misses: **/mlp/up"),
        ({"where": ["mlp", "nrm"]}, "'nrm' matches no weight; near misses: **/norm"),
        ({"where": lambda path: path == "count"}, "count is int32 numbers; choose floating-point"),
    ],
)
def test_bad_storage_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        store_weights({**weights(), "count": jnp.int32(0)}, **options)
    text = str(error.value)
    if "near misses" in message:
        message, text = message.split(";")[0], text.split(";")[0]
    assert message in text and "\n" not in str(error.value)


def test_weights_are_stored_once() -> None:
    stored = store_weights(weights(), where="mlp")
    with pytest.raises(ConfigError, match="mlp/up is stored in e4m3; choose"):
        store_weights(stored, where="mlp")
    both = store_weights(stored, "e5m2", where=lambda path: path == "norm")
    assert both["norm"].format.name == "e5m2" and both["mlp"]["up"] is stored["mlp"]["up"]


def test_stored_weights_need_a_rule_and_no_delta() -> None:
    stored = store_weights(weights(), where="mlp")
    with pytest.raises(ConfigError, match="weights are stored in e4m3, which needs an update rule"):
        wrap(optax.sgd(1.0), get_precision("bf16")).init(stored)
    tx = make("nearest").as_optax()
    with pytest.raises(ConfigError, match="as_optax: weights stored in fp8 .*; use Optimizer.step"):
        tx.update(gradients(0), tx.init(stored), stored)


def test_the_view_costs_nothing_where_nothing_is_stored() -> None:
    w = weights()
    assert weight_view(w)["mlp"]["up"] is w["mlp"]["up"]
    assert bits(w["norm"]).dtype == jnp.uint32


# By rule.

TINY = dict(layers=1, width=32, heads=2, vocabulary=64)
LOW = ["**/kernel=p=e4m3", "**/table=p=e5m2"]


def test_a_rule_stores_weights_in_fp8() -> None:
    """The draws are those of float32, the forward pass that of the rounded weights."""
    precision = get_precision("bf16", rules=LOW, update="stochastic")
    assert get_precision(precision.to_text()) == precision == get_precision(precision.to_json())
    model, plain = decoder("tiny", precision, **TINY), decoder("tiny", "bf16", **TINY)
    key = jax.random.key(3)
    params, drawn = jax.jit(model.init)(key), jax.jit(plain.init)(key)
    up = params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert up.format.name == "e4m3" and up.scales.shape == (1, 32, 1)
    assert params["decoder"]["embed"]["table"].format.name == "e5m2"
    assert params["decoder"]["norm"]["scale"].dtype == jnp.float32
    rounded = store_weights(drawn, where=lambda path: path.endswith("kernel"))
    rounded = store_weights(rounded, "e5m2", where=lambda path: path.endswith("table"))
    assert raw(rounded) == raw(params)
    ids = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    stored, view, first = (
        jax.jit(model.loss)(p, {"inputs": ids, "targets": ids})[0]
        for p in (params, weight_view(params), drawn)
    )
    assert raw(stored) == raw(view) != raw(first)


@pytest.mark.parametrize("mesh", [None, "fsdp=4,tensor=2"])
def test_a_decoder_trains_with_fp8_weights(mesh: str | None) -> None:
    precision = get_precision("bf16", rules=LOW, update="stochastic")
    state, step = build(decoder("tiny", precision, **TINY), optax.sgd(0.5), mesh, seed=1)
    assert step.init is not None
    assert raw(step.init(2).opt_state.update_state["key"]) != raw(
        state.opt_state.update_state["key"]
    )
    ids = jnp.tile(jnp.arange(9, dtype=jnp.int32), (8, 1))
    batch = {"inputs": ids[:, :-1], "targets": ids[:, 1:]}
    losses = []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0] and int(state.opt_state.update_state["draws"]) == 10
    up = state.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    if mesh:
        shard = up.values.addressable_shards[0].data
        assert shard.size == up.values.size // 8 and up.scales.sharding.is_fully_replicated


@pytest.mark.parametrize(
    ("rule", "update", "message"),
    [
        ("**/mlp=p=e4m3,c=e4m3", "nearest", "c: e4m3 is a format of weights, which have scales"),
        ("**/mlp=e5m2", "nearest", "e5m2 is a format of weights, which have scales; write p=e5m2,"),
        ("**/kernel=p=e4m3", "none", "stores weights in e4m3, which needs an update rule; set"),
        ("**/kernel=p=e3m2", "nearest", "unknown dtype 'e3m2'"),
        ("**/kernel=p=e4m3,c=bf16", "nearest", "names weights only, for which only p= counts"),
    ],
)
def test_a_bad_fp8_rule_is_refused(rule: str, update: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        decoder("tiny", get_precision("bf16", rules=[rule], update=update), **TINY)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_fp8_without_a_compute_dtype_computes_in_float32() -> None:
    policy = get_precision("bf16", rules=["**/mlp=p=e5m2"], update="nearest").policy("a/mlp")
    assert (policy.param_dtype, policy.compute_dtype) == (jnp.float8_e5m2, jnp.float32)
