"""Means of eight replicas by narrow messages: what is sent, what stays, and who agrees."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

from mpjax.errors import ConfigError
from mpjax.optim import Exchange, ExchangeState, one_bit_adam
from mpjax.optim.compression import compressed_paths, scale_by_frozen_adam
from mpjax.precision import Compression

REPLICAS = 8
PARAMS = {
    "embed": jnp.zeros((37, 30)),
    "layers": {"up": jnp.zeros((2, 24, 20)), "norm": jnp.zeros((2, 20))},
    "bias": jnp.zeros(10),
}
FORMS = ("bf16", "f16", "int8@64", "int4@64", "e4m3@64", "e5m2@64", "sign@64", "int8@64,prune=0.75",
         "topk:0.05", "powersgd:2")  # fmt: skip
STEPS = 6

pytestmark = pytest.mark.usefixtures("fast_compile")


def _gradients(step: int) -> Any:
    rng = np.random.default_rng(step)
    common = jax.tree.map(lambda p: rng.normal(size=p.shape), PARAMS)  # what replicas agree on
    return jax.tree.map(
        lambda c: jnp.asarray(1e-3 * (c + rng.normal(size=(REPLICAS, *c.shape))), jnp.float32),
        common,
    )


@functools.cache
def _exchange(text: str) -> tuple[Any, Any]:
    """The first state of all replicas, and one step of them."""
    exchange = Exchange(text, "data", REPLICAS)
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (REPLICAS, *x.shape)), exchange.init(PARAMS))

    def own(grads: Any, state: ExchangeState) -> Any:
        grads, state = jax.tree.map(lambda x: x[0], (grads, state))
        return jax.tree.map(lambda x: x[None], exchange.mean(grads, state))

    mesh, rows = Mesh(np.array(jax.devices()), "data"), PartitionSpec("data")
    split = jax.shard_map(own, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    return state, jax.jit(split)


def _run(text: str, steps: int = STEPS) -> tuple[list[Any], ExchangeState]:
    state, step = _exchange(text)
    means = []
    for i in range(steps):
        mean, state = step(_gradients(i), state)
        means.append(jax.tree.map(np.asarray, mean))
    return means, state


def _leaf(tree: Any, name: str) -> np.ndarray:
    for part in name.split("/"):
        tree = tree[part]
    return np.asarray(tree, np.float64)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_sent_and_what_stays_is_the_sum_of_gradients(form: str) -> None:
    means, state = _run(f"{form},min=100")
    assert set(state.residual) == {"embed", "layers/up"}
    for name, residual in state.residual.items():
        sent = sum(REPLICAS * _leaf(mean, name)[0] for mean in means)
        total = sum(_leaf(_gradients(i), name).sum(0) for i in range(STEPS))
        left = np.asarray(residual, np.float64).sum(0)
        size = np.abs(total).max()
        assert np.abs(sent + left - total).max() < 1e-5 * size
        assert np.abs(sent - total).max() > 1e-5 * size  # without the residual it does not add up


@pytest.mark.parametrize("form", FORMS)
def test_all_replicas_have_one_mean_and_small_weights_the_exact_one(form: str) -> None:
    means, _ = _run(f"{form},min=100")
    for mean in means:
        assert jax.tree.all(jax.tree.map(lambda x: (x == x[:1]).all(), mean))
    for name in ("bias", "layers/norm"):
        exact = _leaf(_gradients(0), name).mean(0)
        np.testing.assert_allclose(_leaf(means[0], name)[0], exact, rtol=1e-5, atol=1e-9)


def _step_in_numpy(text: str, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two exchanges of blocks of 8 bits: the mean and what each replica keeps."""

    def code(x: np.ndarray) -> np.ndarray:
        blocks = x.reshape(*x.shape[:-1], -1, 64)
        scale = np.abs(blocks).max(-1, keepdims=True) / 127
        scale = np.where(scale == 0, 1, scale)
        return (np.rint(blocks / scale) * scale).reshape(x.shape)

    size = whole[0].size
    width = -(-size // (REPLICAS * 64)) * 64
    rows = np.zeros((REPLICAS, REPLICAS * width))
    rows[:, :size] = whole.reshape(REPLICAS, -1)
    rows = rows.reshape(REPLICAS, REPLICAS, width)  # of a replica, to a replica
    sent = code(rows)
    owned = sent.mean(0)
    answer = code(owned)
    left = rows - sent
    for i in range(REPLICAS):
        left[i, i] += REPLICAS * (owned[i] - answer[i])
    return answer.reshape(-1)[:size], left.reshape(REPLICAS, -1)[:, :size]


def test_two_steps_equal_numpy() -> None:
    means, state = _run("int8@64,min=100", 2)
    whole = _leaf(_gradients(0), "embed")
    first, left = _step_in_numpy("int8", whole)
    second, left = _step_in_numpy("int8", _leaf(_gradients(1), "embed") + left.reshape(whole.shape))
    for got, want in zip(means, (first, second), strict=True):
        close = np.isclose(_leaf(got, "embed")[0].reshape(-1), want, rtol=1e-4, atol=1e-9)
        assert close.mean() > 0.999  # a tie may fall to the other side in float64
    off = np.abs(np.asarray(state.residual["embed"]).reshape(REPLICAS, -1) - left)
    assert (off < 1e-8).mean() > 0.999


def test_the_largest_numbers_are_sent_and_spend_their_momentum() -> None:
    text = "topk:0.05,momentum=0.9,min=100"
    means, state = _run(text, 3)
    name, decay = "embed", 0.9
    u = v = np.zeros((REPLICAS, 37 * 30))
    count = round(0.05 * 37 * 30)
    for i in range(3):  # Deep Gradient Compression, algorithm 2
        u = decay * u + _leaf(_gradients(i), name).reshape(REPLICAS, -1)
        v = v + u
        places = np.argsort(-np.abs(v), axis=-1)[:, :count]
        sent = np.zeros_like(v)
        np.put_along_axis(sent, places, np.take_along_axis(v, places, -1), -1)
        for kept in (u, v):
            np.put_along_axis(kept, places, 0, -1)
        got = _leaf(means[i], name)[0].reshape(-1)
        np.testing.assert_allclose(got, sent.mean(0), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(state.momentum[name].reshape(REPLICAS, -1), u, rtol=1e-4, atol=1e-8)


def test_low_rank_equals_numpy_and_a_matrix_of_that_rank_is_exact() -> None:
    means, state = _run("powersgd:2,min=100", 1)
    g = _leaf(_gradients(0), "layers/up")
    _, first = _exchange("powersgd:2,min=100")
    q = np.asarray(Exchange("powersgd:2,min=100", "data", REPLICAS).init(PARAMS).basis["layers/up"])
    for layer in range(2):
        p = np.linalg.qr((g[:, layer] @ q[layer]).mean(0))[0]
        right = np.einsum("rij,ik->jk", g[:, layer], p) / REPLICAS
        np.testing.assert_allclose(
            _leaf(means[0], "layers/up")[0, layer], p @ right.T, rtol=1e-3, atol=1e-7
        )
    rank_one = jax.tree.map(
        lambda p: jnp.broadcast_to(jnp.arange(1.0, p.shape[-1] + 1), (REPLICAS, *p.shape)), PARAMS
    )
    start, step = _exchange("powersgd:2,min=100")
    mean, _ = step(rank_one, start)
    np.testing.assert_allclose(mean["embed"], rank_one["embed"], rtol=1e-4)


def _quadratic(text: str, steps: int, lr: float) -> float:
    """Distance from the minimum of a sum of squares; each replica has a minimum of its own."""
    rng = np.random.default_rng(0)
    exchange = Exchange(text, "data", REPLICAS)
    a, b = rng.normal(size=(REPLICAS, 100, 40)), rng.normal(size=(REPLICAS, 100))
    b += 2 * rng.normal(size=(REPLICAS, 1))
    b += np.einsum("rnd,d->rn", a, rng.normal(size=40)) + np.einsum(
        "rnd,rd->rn", a, rng.normal(size=(REPLICAS, 40))
    )
    truth = np.linalg.lstsq(a.reshape(-1, 40), b.reshape(-1), rcond=None)[0]
    x, y = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)

    def own(x: Any, y: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            w, state = carry
            error = jnp.dot(x[0], w, precision="highest") - y[0]
            grad = jnp.dot(x[0].T, error, precision="highest") / 100
            mean, state = exchange.mean(grad, state)
            return (w - lr * mean, state), None

        start = jnp.zeros(40), exchange.init(jnp.zeros(40))
        (w, _), _ = jax.lax.scan(step, start, None, length=steps)
        return w

    mesh, rows = Mesh(np.array(jax.devices()), "data"), PartitionSpec("data")
    split = jax.shard_map(own, mesh=mesh, in_specs=rows, out_specs=PartitionSpec(), check_vma=False)
    w = jax.jit(split)(x, y)
    return float(np.linalg.norm(np.asarray(w) - truth) / np.linalg.norm(truth))


def test_signs_converge_with_feedback_and_not_without() -> None:
    with_feedback = _quadratic("sign@8,min=0", 1500, 0.01)
    without = _quadratic("sign@8,min=0,feedback=off", 1500, 0.01)
    assert with_feedback < 0.01 < 0.05 < without


NARROW = {"int8@64": "i8", "e4m3@64": "ui8", "int4@64": "ui8", "sign@64": "ui8", "bf16": "bf16",
          "topk:0.05": "i32", "powersgd:2": "f32", "int8@64,prune=0.75": "i8"}  # fmt: skip


def _collectives(text: str) -> list[tuple[str, int, str]]:
    """Kind, elements of the operand and its dtype of each collective of a StableHLO program."""
    kinds = r'"stablehlo\.(all_to_all|all_gather|all_reduce)"\(%\w+\)'
    found = re.findall(kinds + r".*?: \(tensor<((?:\d+x)*)(\w+)>\)", text, re.S)
    sizes = [int(np.prod([int(n) for n in shape.split("x") if n] or [1])) for _, shape, _ in found]
    return [(kind, size, dtype) for (kind, _, dtype), size in zip(found, sizes, strict=True)]


@pytest.mark.parametrize("form", NARROW)
def test_the_program_sends_what_is_said_and_in_narrow_dtypes(form: str) -> None:
    state, step = _exchange(f"{form},min=100")
    found = _collectives(step.lower(_gradients(0), state).as_text())
    numbers = sum(x.size for x in state.residual.values()) / REPLICAS
    by_dtype = {d: sum(n for _, n, dtype in found if dtype == d) for _, _, d in found}
    assert by_dtype[NARROW[form]] > 0
    if form != "powersgd:2":  # beside scales, the numbers of topk, and weights that are too small
        assert by_dtype.get("f32", 0) < 0.1 * numbers
    widths = {"i8": 1, "ui8": 1, "bf16": 2, "i32": 4, "f32": 4}
    times = {"all_to_all": 7 / 8, "all_gather": 7, "all_reduce": 2 * 7 / 8}
    sent = sum(times[kind] * size * widths[dtype] for kind, size, dtype in found)
    exchange = Exchange(f"{form},min=100", "data", REPLICAS)
    assert exchange.sent_bytes(PARAMS) == pytest.approx(sent)


@pytest.mark.parametrize(("form", "share"), [("int8@256", 0.27), ("int4@64", 0.15), ("sign", 0.04)])
def test_what_is_sent_of_a_large_weight_beside_float32(form: str, share: float) -> None:
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    exact = Exchange(f"{form},min=10000000", "data", 8).sent_bytes(params)
    assert exact == 2 * 7 / 8 * 4 * 2**20
    assert Exchange(form, "data", 8).sent_bytes(params) < share * exact


def test_a_warm_up_is_sent_in_float32() -> None:
    means, state = _run("topk:0.05,warmup=2,min=100", 3)
    for i, exact in ((0, True), (1, True), (2, False)):
        want = _leaf(_gradients(i), "embed").mean(0)
        close = np.allclose(_leaf(means[i], "embed")[0], want, rtol=1e-4, atol=1e-9)
        assert close is exact
    assert int(state.steps[0]) == 3


def test_one_bit_adam_has_the_mean_that_was_sent_as_its_first_moment() -> None:
    means, state = _run("sign@64,momentum=0.9,warmup=2,min=100", 5)
    rule = scale_by_frozen_adam(2)
    held = rule.init(PARAMS["embed"])
    for mean in means:
        _, held = rule.update(jnp.asarray(mean["embed"][0]), held)
    np.testing.assert_allclose(held.mu, state.momentum["embed"][0], rtol=1e-4, atol=1e-9)
    adam = optax.scale_by_adam()
    plain = adam.init(PARAMS["embed"])
    with jax.numpy_dtype_promotion("standard"):
        for mean in means[:2]:
            want, plain = adam.update(jnp.asarray(mean["embed"][0]), plain)
    fresh = rule.init(PARAMS["embed"])
    for mean in means[:2]:
        got, fresh = rule.update(jnp.asarray(mean["embed"][0]), fresh)
    np.testing.assert_allclose(got, want, rtol=1e-5)  # in the warm-up it is Adam
    np.testing.assert_array_equal(held.nu, fresh.nu)  # and after it the second moment stays
    with pytest.raises(ConfigError, match="warmup: 0 is no number of steps"):
        one_bit_adam(1e-3, 0)


def test_which_weights_are_compressed() -> None:
    assert compressed_paths(PARAMS, Compression.parse("int8")) == frozenset()
    assert compressed_paths(PARAMS, Compression.parse("int8,min=40")) == {
        "embed", "layers/up", "layers/norm"
    }  # fmt: skip
    assert compressed_paths(PARAMS, Compression.parse("powersgd:2,min=0")) == {"embed", "layers/up"}
    assert compressed_paths(PARAMS, Compression.parse("powersgd:12,min=0")) == {"embed"}


@pytest.mark.parametrize(
    ("text", "size", "said"),
    [("none", 8, "none sends nothing"), ("int8", 1, "the axis 'data' has 1; give it at least 2"),
     ("int8", 2.0, "has 2.0"), ("int7", 8, "unknown form 'int7'")],
)  # fmt: skip
def test_a_wrong_exchange_is_one_line(text: str, size: Any, said: str) -> None:
    with pytest.raises(ConfigError, match="compression: ") as error:
        Exchange(text, "data", size)
    assert said in str(error.value)
