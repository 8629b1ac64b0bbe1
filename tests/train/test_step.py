"""The train step: accumulation, skips on many devices, dropout keys, donation, live bytes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mpjax.errors import ConfigError
from mpjax.ops import Objective, rows_alike, weight_sum
from mpjax.optim import ScaledGradients, all_finite, wrap
from mpjax.precision import get_precision
from mpjax.train import build, init_state, make_train_step, parse_mesh
from mpjax.train.report.memory import bytes_per_parameter, formula, state_bytes
from tests.ops.jaxprs import equations
from tests.train.meshes import batch, compiled, host, relative, small

pytestmark = pytest.mark.usefixtures("fast_compile")


def _bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# --- a model in bare JAX --------------------------------------------------------------------------


def _linear_loss(params: Any, data: Any, *, state: Any, key: Any, train: bool) -> Any:
    assert train and key is not None
    x, y = data
    error = (x.astype(params["w"].dtype) @ params["w"]).astype(jnp.float32) - y
    return jnp.mean(jnp.square(error)), {"seen": state["seen"] + 1}


def _linear(precision: Any, tx: Any, w: Any, **options: Any) -> Any:
    optimizer = wrap(tx, get_precision(precision), **options)
    state = init_state({"w": w}, optimizer, model_state={"seen": jnp.int32(0)})
    return state, make_train_step(_linear_loss, optimizer)


def test_a_bare_jax_model_follows_gradient_descent_in_numpy() -> None:
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(6, 3)), rng.normal(size=6), rng.normal(size=3)
    data = tuple(jnp.asarray(a, jnp.float32) for a in (x, y))
    state, step = _linear("fp32", optax.sgd(0.1), jnp.asarray(w, jnp.float32))
    for i in range(4):
        state, metrics = step(state, data)
        error = x @ w - y
        assert float(metrics["loss"]) == pytest.approx((error**2).mean(), rel=1e-5)
        w = w - 0.1 * 2 * x.T @ error / 6
        assert int(state.step) == int(state.model_state["seen"]) == i + 1
    np.testing.assert_allclose(np.asarray(state.params["w"]), w, rtol=1e-5)
    assert set(metrics) == {"loss", "loss_scale", "skipped", "stuck"}


def test_the_gradient_norm_is_reported_before_it_is_clipped() -> None:
    data = (jnp.eye(2), jnp.array([-30.0, -40.0]))
    state, step = _linear("fp32", optax.sgd(1.0), jnp.zeros(2), clip=1.0)
    state, metrics = step(state, data)
    assert float(metrics["grad_norm"]) == pytest.approx(50.0)
    np.testing.assert_allclose(np.asarray(state.params["w"]), [-0.6, -0.8], rtol=1e-6)


def test_a_skipped_step_keeps_the_model_state_too() -> None:
    state, step = _linear("fp16", optax.adam(0.1), jnp.ones(2))
    data = (jnp.eye(2), jnp.array([1.0, 2.0]))
    state, _ = step(state, data)
    before, scale = host(state), float(state.opt_state.loss_scale.value)
    state, metrics = step(state, (data[0], jnp.array([jnp.nan, 2.0])))
    assert int(metrics["skipped"]) == 1 and int(state.step) == 2
    assert _bits(state.model_state) == _bits(before.model_state)
    assert _bits(state.params) == _bits(before.params)
    assert _bits(state.opt_state.inner) == _bits(before.opt_state.inner)
    assert float(state.opt_state.loss_scale.value) == scale / 2
    state, metrics = step(state, data)
    assert int(metrics["skipped"]) == 1 and int(state.model_state["seen"]) == 2
    assert _bits(state.params) != _bits(before.params)


def test_the_old_state_is_donated() -> None:
    state, step = _linear("fp32", optax.adam(0.1), jnp.ones(2))
    data = (jnp.eye(2), jnp.zeros(2))
    new, _ = step(state, data)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state.inner)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, data)))
    plain, _ = step.function(new, data)  # the undonated function leaves its argument alone
    assert not new.params["w"].is_deleted() and int(plain.step) == 2


# --- accumulation ---------------------------------------------------------------------------------


def _gradients(accumulate: int, mesh: str | None = None) -> Any:
    """Loss and gradients of the first step, as momentum holds them: exactly."""
    tx = optax.sgd(1.0, momentum=0.9)
    state, step = build(small(), tx, mesh, accumulate=accumulate)
    state, metrics = compiled(state, step)(state, batch())
    return float(metrics["loss"]), host(state.opt_state.inner)


@pytest.fixture(scope="module")
def at_once() -> Any:
    return _gradients(1)


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,tensor=2"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(mesh: Any, at_once: Any) -> None:
    parts = 4 if mesh is None else 2
    loss, grads = _gradients(parts, mesh)
    assert loss == pytest.approx(at_once[0], rel=1e-6)
    assert relative(grads, at_once[1]) < (1e-6 if mesh is None else 1e-5)
    summed = jax.tree.map(lambda g: parts * g, grads)  # the mutant: a sum for a mean
    assert relative(summed, at_once[1]) > 0.9


def test_microbatches_count_by_their_targets() -> None:
    data = batch()
    weights = np.zeros(data["targets"].shape, np.float32)
    weights[::2], weights[1, :1] = 1, 1  # rows of the second microbatch have one target in all
    found = []
    for n in (1, 2):
        state, step = build(small(), optax.sgd(1.0, momentum=0.9), accumulate=n)
        state, metrics = step(state, data | {"weights": jnp.asarray(weights)})
        found.append((float(metrics["loss"]), host(state.opt_state.inner)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    # Sums in another order, of means that are scaled: 6e-7 to 1.1e-6 by the CPU's vector width.
    assert relative(found[1][1], found[0][1]) < 2e-6
    state, step = build(small(), optax.sgd(1.0), accumulate=2)
    mute = data | {"weights": jnp.zeros(weights.shape)}
    state, metrics = step(state, mute)
    assert float(metrics["loss"]) == 0 and int(metrics["skipped"]) == 0
    alike = make_train_step(  # the negative control: all microbatches alike
        lambda *args, **kw: small().loss(*args, **kw), wrap(optax.sgd(1.0), small().precision),
        accumulate=2, count=rows_alike,
    )  # fmt: skip
    state = init_state(small().init(jax.random.key(0)), alike.optimizer)
    _, metrics = alike(state, data | {"weights": jnp.asarray(weights)})
    assert float(metrics["loss"]) != pytest.approx(found[0][0], rel=1e-3)


def test_low_weights_accumulate_in_float32() -> None:
    precision = get_precision("bf16", rules=["**=p=bf16,c=bf16,o=bf16"], update="master")
    optimizer = wrap(optax.sgd(1.0), precision)

    def loss(params: Any, data: Any, *, state: Any, key: Any, train: bool) -> Any:
        return jnp.mean(data * params["w"]).astype(jnp.float32), state

    # Gradients of the four rows: in bfloat16 256 + 1 + 1 + 1 is 256, a mean of 64.
    data = jnp.array([256.0, 1.0, 1.0, 1.0], jnp.bfloat16)
    steps = {n: make_train_step(loss, optimizer, accumulate=n, count=rows_alike) for n in (1, 4)}
    new = {}
    for n, step in steps.items():
        state = init_state({"w": jnp.zeros((), jnp.bfloat16)}, optimizer)
        state, _ = step(state, data)
        new[n] = float(state.opt_state.update_state["master"]["w"])
    assert new[4] == -259 / 4
    assert new[1] != -259 / 4  # the negative control: one bfloat16 gradient cannot hold it


def test_the_accumulator_is_float32() -> None:
    model = small("pure-bf16")
    optimizer = wrap(optax.sgd(1.0), model.precision)
    step = make_train_step(model.loss, optimizer, accumulate=2, count=weight_sum)
    state = jax.eval_shape(lambda: init_state(model.init(jax.random.key(0)), optimizer))
    shape = state.params["decoder"]["embed"]["table"].shape
    scans = [e for e in equations(step.function, state, batch()) if e.primitive.name == "scan"]
    carried = {
        v.aval.dtype.name for e in scans for v in e.outvars if getattr(v.aval, "shape", 0) == shape
    }
    assert carried == {"float32"}


def test_accumulate_is_checked() -> None:
    with pytest.raises(ConfigError, match="accumulate: 0 must be at least 1"):
        make_train_step(_linear_loss, wrap(optax.sgd(1.0), get_precision("fp32")), accumulate=0)


# --- keys -----------------------------------------------------------------------------------------


def test_dropout_differs_by_step_and_microbatch_and_repeats_by_seed() -> None:
    rows = jax.tree.map(lambda x: jnp.tile(x[:1], (4, 1)), batch())  # equal rows: only keys differ

    def losses(seed: int, accumulate: int = 1, rate: float = 0.3) -> list[float]:
        state, step = build(small(dropout=rate), optax.sgd(0.0), seed=seed, accumulate=accumulate)
        state = state._replace(params=jax.tree.map(jnp.asarray, weights))  # of one seed for all
        run, out = compiled(state, step, rows), []
        for _ in range(2):
            state, metrics = run(state, rows)
            out.append(float(metrics["loss"]))
        return out

    weights = host(build(small(), optax.sgd(0.0))[0].params)
    first, again, other = losses(0), losses(0), losses(1)
    off, parts = losses(0, rate=0.0), losses(0, accumulate=4)
    assert first == again
    assert first[0] != first[1]
    assert first[0] != other[0]
    assert off[0] == off[1]
    assert len({*first, *parts}) == 4


# --- one bad shard, one bad replica ---------------------------------------------------------------


@jax.custom_vjp
def _poisoned(w: Any, bad: Any) -> Any:
    return w


def _poison(bad: Any, dw: Any) -> Any:
    return dw.at[0, 5].add(jnp.where(bad > 0, jnp.nan, 0.0)), jnp.zeros_like(bad)


_poisoned.defvjp(lambda w, bad: (w, bad), _poison)


def test_one_nan_in_one_shard_makes_every_device_skip() -> None:
    model = small("fp16", loop="scan")
    start, plain = build(model, optax.adamw(1e-2), "fsdp=8", clip=1.0)

    def loss(params: Any, data: Any, **options: Any) -> Any:
        table = params["decoder"]["embed"]["table"]
        bad = jnp.max(data["bad"])
        decoder = params["decoder"] | {"embed": {"table": _poisoned(table, bad)}}
        return model.loss({"decoder": decoder}, data, **options)

    step = make_train_step(loss, plain.optimizer, mesh=plain.mesh, shardings=plain.shardings)

    def data(i: int, bad: float) -> Any:
        return batch(i) | {"bad": jnp.full(8, bad)}

    table = start.params["decoder"]["embed"]["table"]
    cuts = [shard.index[1] for shard in table.addressable_shards]
    holders = [cut for cut in cuts if cut.start <= 5 < cut.stop]
    assert len(holders) == 1  # the NaN is one element of one device's shard
    run = compiled(start, step, data(0, 0.0))
    state, metrics = run(start, data(0, 0.0))
    assert int(metrics["skipped"]) == 0
    before = host(state)
    state, metrics = run(state, data(1, 1.0))
    assert int(metrics["skipped"]) == 1 and np.isfinite(float(metrics["loss"]))
    after = host(state)
    kept = lambda s: (s.params, s.opt_state.inner, s.opt_state.update_state, s.key)  # noqa: E731
    assert _bits(kept(after)) == _bits(kept(before))
    assert after.opt_state.loss_scale.state[0] == before.opt_state.loss_scale.state[0] / 2
    assert (int(after.step), int(after.opt_state.gate.skipped)) == (2, 1)
    for leaf in jax.tree.leaves((state.opt_state.gate, state.opt_state.loss_scale, state.step)):
        assert len({np.asarray(s.data).tobytes() for s in leaf.addressable_shards}) == 1
    state, metrics = run(state, data(2, 0.0))
    assert int(metrics["skipped"]) == 1 and all_finite(state.params).item()
    assert _bits(host(state).params) != _bits(after.params)


@pytest.mark.parametrize("reduced", [True, False], ids=["psum", "control"])
def test_one_nan_in_one_replica_makes_every_replica_skip(reduced: bool) -> None:
    mesh = parse_mesh("data=8")
    optimizer = wrap(optax.adam(0.1), get_precision("fp16"))
    params = {"w": jnp.arange(1.0, 4.0)}
    opt_state = optimizer.init(params)

    def replica(params: Any, opt_state: Any, x: Any) -> Any:
        def loss(params: Any) -> Any:
            return opt_state.loss_scale.scale(jnp.mean(jnp.square(x @ params["w"])))

        grads = jax.grad(loss)(params)
        if reduced:
            grads = jax.tree.map(lambda g: jax.lax.pmean(g, "data"), grads)
        new = optimizer.step(ScaledGradients(grads), opt_state, params)
        return jax.tree.map(lambda leaf: leaf[None], new)  # one copy a replica

    step = jax.jit(
        jax.shard_map(
            replica, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P("data"), check_vma=False
        )
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    good, _ = step(params, opt_state, x)
    assert not np.array_equal(np.asarray(good["w"][0]), np.asarray(params["w"]))
    new, state = host(step(params, opt_state, x.at[3, 0].set(jnp.nan)))
    same = [np.array_equal(new["w"][i], np.asarray(params["w"])) for i in range(8)]
    skipped = state.gate.skipped.tolist()
    if not reduced:  # without the sum only one replica sees the NaN, and the replicas part
        assert skipped == [0, 0, 0, 1, 0, 0, 0, 0] and same == [bool(s) for s in skipped]
        return
    assert skipped == [1] * 8 and all(same)
    for i in range(8):
        mine = jax.tree.map(lambda leaf: leaf[i], state)  # noqa: B023
        assert _bits(mine.inner) == _bits(opt_state.inner)
        assert float(mine.loss_scale.value) == float(opt_state.loss_scale.value) / 2


# --- live bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "bytes_each"),
    [
        ("fp32", 4 + 8),
        ("bf16", 4 + 8),
        ("fp16", 4 + 8),
        ("pure-bf16", 2 + 8),
        ("O2", 2 + 8 + 4),
        (dict(value="fp32", moments="bf16"), 4 + 4),
        (dict(value="pure-bf16", moments="first=bf16"), 2 + 6),
    ],
    ids=str,
)
def test_live_bytes_per_parameter(precision: Any, bytes_each: float) -> None:
    precision = get_precision(**precision) if isinstance(precision, dict) else precision
    state, _ = build(small(precision, vocabulary=256, width=64), optax.adamw(1e-3))
    assert bytes_per_parameter(state) == pytest.approx(bytes_each, rel=0.01)
    sizes = state_bytes(state)
    live = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert sizes["total"] == sizes["device"] == live
    assert sizes["total"] == sum(sizes[kind] for kind in ("params", "moments", "master", "rest"))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert formula(state) == (
        f"({sizes['params']} params + {sizes['moments']} moments + {sizes['master']} master"
        f" + {sizes['rest']} rest) bytes / {count} parameters = {live / count:.3f}"
    )


def test_microbatches_of_a_loss_that_does_not_say_what_it_is_a_mean_over() -> None:
    optimizer = wrap(optax.sgd(1.0), get_precision("fp32"))
    with pytest.raises(ConfigError, match=r"pass count=mpjax.ops.rows_alike for a mean over rows"):
        make_train_step(_linear_loss, optimizer, accumulate=2)
    wrapped = lambda *args, **options: small().loss(*args, **options)  # noqa: E731
    with pytest.raises(ConfigError, match="accumulate: 2 microbatches count by their targets"):
        build(small(), optax.sgd(1.0), accumulate=2, objective=lambda model: wrapped)
    objective = Objective(_linear_loss, rows_alike)
    with pytest.raises(ConfigError, match="the objective has its own"):
        make_train_step(objective, optimizer, accumulate=2, count=rows_alike)


@pytest.mark.parametrize("objective", [None, "language", {}])
def test_an_objective_that_is_none(objective: object) -> None:
    with pytest.raises(ConfigError, match="^objective: .*; give a function from the model [^\n]*$"):
        build(small(), optax.sgd(1.0), objective=objective)  # type: ignore[arg-type]


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,tensor=2"])
def test_given_weights_begin_a_run_and_stay_the_callers(mesh: str | None) -> None:
    model = small("pure-bf16")
    params = model.init(jax.random.key(9))
    before = [np.asarray(x).tobytes() for x in jax.tree.leaves(params)]
    state, step = build(model, optax.sgd(1.0), mesh, params=params)
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(state.params)] == before
    assert step.init is not None
    again = step.init(5)  # another seed, the same weights
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(again.params)] == before
    ids = np.ones((8, 9), np.int32)
    state, _ = step(state, {"inputs": ids[:, :-1], "targets": ids[:, 1:]})
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(params)] == before
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(state.params)] != before


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (lambda p: jax.tree.map(lambda x: x.astype(np.float32), p), "is float32.*has bfloat16"),
        (lambda p: {"decoder": p["decoder"]["embed"]}, "more differ"),
        (lambda p: 3, "is absent|is 3"),
        (lambda p: jax.tree.map(lambda x: x[..., :1], p), "and the model has"),
    ],
)
def test_weights_of_another_model_are_one_line(params: Any, said: str) -> None:
    model = small("pure-bf16")
    with pytest.raises(ConfigError, match=f"^params: [^\n]*({said})") as error:
        build(model, optax.sgd(1.0), params=params(model.init(jax.random.key(0))))
    assert "\n" not in str(error.value)
