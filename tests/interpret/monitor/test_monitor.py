"""What a monitor measures, what it is called, and that it changes nothing."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from mpjax.errors import ConfigError
from mpjax.formats import quantize, round_to, saturation_rate, sqnr, underflow_rate
from mpjax.interpret.monitor.measure import candidates, fold, measure, merge
from mpjax.interpret.monitor.monitor import monitor
from mpjax.interpret.monitor.report import Monitored
from mpjax.interpret.monitor.statistics import Statistics, statistics
from mpjax.models import decoder
from mpjax.train import build
from mpjax.train.report.metrics_writer import read_metrics
from mpjax.train.report.tensor_monitor import TensorWriter, watched

pytestmark = pytest.mark.usefixtures("fast_compile")
FORMATS = ("e4m3", "e5m2", "bf16", "fp16", "int8")


@functools.partial(jax.jit, static_argnums=1)
def measured(x: Any, formats: tuple[str, ...] = ("e4m3",)) -> Statistics:
    return statistics(x, formats)


def numbers(dtype: Any = np.float32, size: int = 6000) -> np.ndarray:
    """Numbers of all magnitudes, zeros, subnormals and non-finite ones among them."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=size) * 2.0 ** rng.uniform(-140, 100, size)
    x[:7] = [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-149, -(2.0**-130)]
    x[7:40] = 2.0 ** np.arange(-16, 17)  # on the edges of bins and formats
    with np.errstate(over="ignore"):
        return x.astype(dtype)


EDGES = 2.0 ** np.arange(-126, 129)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_the_histogram_is_numpys(dtype: Any) -> None:
    x = numbers(dtype)
    s = measured(jnp.asarray(x))
    wide = x.astype(np.float64)
    magnitude = np.abs(wide[np.isfinite(wide)])
    expected = np.histogram(magnitude[magnitude >= EDGES[0]], EDGES)[0]
    assert np.array_equal(s.histogram, expected)
    assert int(s.size) == x.size
    counted = [float(v * x.size) for v in (s.zeros, s.subnormal, s.infinite, s.nan)]
    tiny = np.sum((magnitude > 0) & (magnitude < EDGES[0]))
    zeros, inf, nan = np.sum(magnitude == 0), np.isinf(wide).sum(), np.isnan(wide).sum()
    assert np.allclose(counted, [zeros, tiny, inf, nan], atol=1e-3)
    assert float(s.amax) == magnitude.max()
    assert float(s.max) == wide[np.isfinite(wide)].max()


@pytest.mark.parametrize("power", [0, -20, -100, -140])
def test_moments_and_rates_are_those_of_the_measures(power: int) -> None:
    x = jax.random.normal(jax.random.key(1), (70, 90)) * 3
    x = jnp.asarray(np.asarray(x, np.float64) * 2.0**power, jnp.float32)
    s = measured(x, FORMATS)
    wide = np.asarray(x, np.float64)
    if power > -110:  # below, a mean square is no float32
        assert np.isclose(float(s.rms), np.sqrt(np.mean(wide**2)), rtol=1e-5)
        assert np.isclose(float(s.mean), wide.mean(), rtol=1e-3, atol=1e-3 * abs(float(s.rms)))
    for c in candidates(FORMATS):
        q: Any = quantize(x, c.format, "tensor") if c.scaled else round_to(x, c.format)
        where = c.name, c.scaled
        assert float(s.underflow(*where)) == pytest.approx(float(underflow_rate(x, q)), abs=1e-6)
        if not c.scaled:
            exact = quantize(x, c.format, "none")
            assert float(s.overflow(*where)) == pytest.approx(float(saturation_rate(x, exact)))
        if power > -30:
            assert s.sqnr(*where) == pytest.approx(float(sqnr(x, q)), abs=2e-3), where


def test_rates_at_the_limits_of_a_format() -> None:
    half = 2.0**-10  # of e4m3's smallest number: the largest that becomes zero
    x = jnp.array([half, np.nextafter(np.float32(half), 1), 448.0, 448.1, 0.0])
    s = measured(x)
    assert float(s.underflow("e4m3")) == pytest.approx(0.2)
    assert float(s.overflow("e4m3")) == pytest.approx(0.2)
    assert int(s.histogram[126 - 10]) == 2


@pytest.mark.parametrize("broken", [None, np.nan, -np.inf])
def test_a_sample_holds_the_extremes_and_estimates_the_rest(broken: float | None) -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 256, 256)) * 2.0**-8).astype(np.float32)
    x[1] *= 0.5
    x[0, 3, 5], x[1, 200, 100] = 1000.0, -2000.0
    if broken is not None:
        x[1, 77, 33] = broken
    formats = candidates(["e4m3"])
    pairs = [jax.jit(lambda x, n=n: measure([(x, True)], formats, [n])[0])(x) for n in (0, 2048)]
    whole, part = (Statistics(*pair, candidates(["e4m3"])) for pair in pairs)
    assert np.all(part.size < 2100) and np.all(whole.size == 256 * 256)
    assert np.array_equal(part.max, whole.max) or broken
    if broken is None:
        assert np.array_equal(part.amax, [1000.0, 2000.0])
    assert (float(part.nan[1] + part.infinite[1]) > 0) == (broken is not None)
    share = np.asarray(whole.underflow("e4m3"))
    assert 0.02 < share[0] < share[1]
    assert np.all(np.abs(part.underflow("e4m3") - share) < 4 * np.sqrt(share / 2048))


def test_a_sample_meets_all_channels() -> None:
    channels = np.broadcast_to(np.arange(64, dtype=np.float32), (512, 64))
    ((counts, reals),) = jax.jit(lambda x: measure([(x, False)], (), [1024]))(channels)
    assert int(counts[:256].sum()) < 1100
    # 4 sigma of one draw from each 32 channels; a stride of 32 would give 16
    assert abs(float(reals[2]) - 31.5) < 4 * 32 / np.sqrt(12 * 1024)


def test_a_sample_follows_no_pattern() -> None:
    sampled = jax.jit(lambda x: measure([(x, False)], (), [2048]))
    for period in range(2, 130):  # an even stride meets one of these in step
        x = jnp.asarray(np.arange(2**17) % period == 0, jnp.float32)
        (pair,) = sampled(x)
        share = float(Statistics(*pair, ()).zeros)
        sigma = np.sqrt((1 - 1 / period) / period / 2048)
        assert abs(share - (1 - 1 / period)) < 4.5 * sigma, period


def test_calls_of_one_name_share_the_sample_by_size() -> None:
    def twice(params: Any, small: Any, large: Any) -> Any:
        with jax.named_scope("layer"):
            return jnp.sum(small @ params["w"]) + jnp.sum(large @ params["w"])

    small, large = jnp.full((64, 8), 1e-9), jnp.full((960, 8), 1.0)  # one of 16 numbers is lost
    args = {"w": jnp.eye(8)}, small, large
    seen = jax.jit(lambda *a: monitor(twice, formats=["e4m3"], sample=512)(*a)[1])(*args)
    lhs = seen.activations["layer:lhs"]
    assert 512 <= int(lhs.size) <= 520
    assert float(lhs.underflow("e4m3")) == pytest.approx(1 / 16, abs=0.01)


def test_parts_give_the_whole() -> None:
    x = jnp.asarray(numbers()[40:].reshape(4, -1)) * 2.0**-20
    formats = candidates(FORMATS)
    ((whole, real),), ((counts, reals),) = jax.jit(
        lambda x: [measure([(x, layered)], formats) for layered in (False, True)]
    )(x)
    joined = jax.jit(merge)((counts, reals))
    scaled = [i for i, c in enumerate(formats) if not c.scaled]  # a scale is of the part it is for
    assert np.array_equal(joined[0][:258], whole[:258])
    assert np.allclose(joined[1][:4], real[:4], rtol=1e-5)
    assert np.allclose(joined[1][4:][jnp.array(scaled)], real[4:][jnp.array(scaled)], rtol=1e-4)
    folded = [jnp.zeros_like(joined[0]), jnp.zeros_like(joined[1])]
    for i in range(4):
        new = counts[i], reals[i]
        folded = [fold(a, b, jnp.int32(i)) for a, b in zip(folded, new, strict=True)]
    assert np.array_equal(folded[0], joined[0])
    assert np.allclose(folded[1], joined[1], rtol=1e-5)


watching = functools.partial(monitor, formats=["e4m3"])


def loss(params: Any, x: Any) -> Any:
    with jax.named_scope("net/up"):
        h = jnp.tanh(x @ params["up"])
    with jax.named_scope("net/down"):
        return jnp.mean(jnp.square(h @ params["down"]))


def small() -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (8, 16)),
        "down": jax.random.normal(keys[1], (16, 4)),
    }
    return params, jax.random.normal(keys[2], (32, 8))


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True) for x, y in pairs)


def close(s: Statistics, x: Any) -> bool:
    expected = measured(x)
    return np.array_equal(s.counts, expected.counts) and np.allclose(
        s.reals, expected.reals, rtol=1e-5
    )


def test_outputs_and_gradients_are_the_functions_own() -> None:
    params, x = small()
    grad = jax.jit(jax.value_and_grad(watching(loss), has_aux=True))
    (value, stats), grads = grad(params, x)
    assert same((value, grads), jax.jit(jax.value_and_grad(loss))(params, x))
    assert close(stats.weights["up"], params["up"])
    assert close(stats.activations["net/up:lhs"], x)
    assert close(stats.activations["net/up:product"], x @ params["up"])
    assert close(stats.activations["net/up:output"], jnp.tanh(x @ params["up"]))
    assert not stats.gradients and not stats.updates and not stats.activation_gradients
    # what is measured does not reach the gradient
    through = jax.jit(jax.grad(lambda p: watching(loss)(p, x)[1].weights["up"].rms))(params)
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(through))


def test_gradients_are_named_after_weights() -> None:
    params, x = small()
    grads, stats = jax.jit(watching(jax.grad(loss)))(params, x)
    assert same(grads, jax.jit(jax.grad(loss))(params, x))
    for name in params:
        assert close(stats.gradients[name], grads[name])
    dy = jax.grad(lambda y: jnp.mean(jnp.square(y)))(jnp.tanh(x @ params["up"]) @ params["down"])
    assert close(stats.activation_gradients["net/down:product"], dy)
    operand = stats.activation_gradients["net/down:operand"]
    assert close(operand, dy @ params["down"].T)
    assert not stats.updates


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_updates_of_a_step(dtype: str) -> None:
    params, x = small()
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    tx = optax.adam(1e-3)

    def step(params: Any, state: Any, x: Any) -> Any:
        grads = jax.grad(lambda p: loss(jax.tree.map(lambda w: w.astype(x.dtype), p), x))(params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        new = jax.tree.map(lambda p, u: p + u.astype(p.dtype), params, updates)
        return new, state

    state = tx.init(params)
    (new, _), stats = jax.jit(watching(step))(params, state, x)
    for name, old in params.items():
        change = new[name].astype(jnp.float32) - old.astype(jnp.float32)
        assert close(stats.updates[name], change)
        stays = float(jnp.mean((new[name] == old).astype(jnp.float32)))
        assert float(stats.unchanged[name]) == pytest.approx(stays)
        assert (stays > 0.05) == (dtype == "bfloat16")  # bfloat16 loses updates of 1e-3
        # the first step of Adam is g / |g|
        assert float(stats.gradient_ratio[name]) == pytest.approx(1, abs=0.05)
        assert float(stats.gradients[name].amax) > 0


def scanned(params: Any, x: Any) -> Any:
    def body(x: Any, w: Any) -> tuple[Any, None]:
        with jax.named_scope("layer"):
            return jnp.tanh(x @ w), None

    return jnp.sum(lax.scan(jax.checkpoint(body), x, params["w"])[0])


def test_scans_over_layers_keep_an_axis() -> None:
    params = {"w": jax.random.normal(jax.random.key(0), (3, 8, 8))}
    x = jax.random.normal(jax.random.key(1), (5, 8))
    grads, stats = jax.jit(watching(jax.grad(scanned)))(params, x)
    assert stats.weights["w"].layers == stats.gradients["w"].layers == (3,)
    assert stats.activations["layer:product"].layers == (3,)
    y = x
    for layer in range(3):
        y = y @ params["w"][layer]
        mine = jax.tree.map(lambda a, i=layer: a[i], stats.activations["layer:product"])
        assert close(mine, y)
        assert close(jax.tree.map(lambda a, i=layer: a[i], stats.gradients["w"]), grads["w"][layer])
        y = jnp.tanh(y)


def test_other_control_flow_is_joined() -> None:
    w = jax.random.normal(jax.random.key(0), (8, 8)) / 3
    xs = jax.random.normal(jax.random.key(1), (4, 6, 8))
    products = jnp.concatenate([x @ w for x in xs])

    def microbatches(params: Any, xs: Any) -> Any:
        return lax.scan(lambda c, x: (c + jnp.sum(x @ params), None), jnp.float32(0), xs)[0]

    def loop(params: Any, xs: Any) -> Any:
        add = lambda i, c: c + jnp.sum(xs[i] @ params)  # noqa: E731
        stop = jnp.int32(4)
        body = lambda s: (s[0] + 1, add(s[0], s[1]))  # noqa: E731
        return lax.while_loop(lambda s: s[0] < stop, body, (jnp.int32(0), jnp.float32(0)))[1]

    def branch(params: Any, xs: Any) -> Any:
        flat = xs.reshape(-1, 8)
        return lax.cond(xs[0, 0, 0] < 9, lambda: jnp.sum(flat @ params), lambda: jnp.float32(0))

    def shards(params: Any, xs: Any) -> Any:
        mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
        spec = PartitionSpec("i")
        part = jax.shard_map(
            lambda p, x: x @ p, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec
        )
        return jnp.sum(part(params, xs))

    for fn in (microbatches, loop, branch, shards):
        s = jax.jit(lambda p, x, fn=fn: watching(fn)(p, x)[1])(w, xs).activations["product"]
        expected = measured(products)
        assert s.layers == ()
        assert np.array_equal(s.histogram, expected.histogram), fn.__name__
        assert float(s.amax) == float(expected.amax)
        assert float(s.rms) == pytest.approx(float(expected.rms), rel=1e-5)


def test_a_branch_that_did_not_run_has_no_record() -> None:
    def fn(params: Any, x: Any) -> Any:
        return lax.cond(x[0, 0] < 9, lambda: jnp.sum(x @ params), lambda: jnp.sum(params @ x))

    eye = jnp.eye(4)
    watched_fn = jax.jit(monitor(fn, what=["activations"], formats=["e4m3"]))
    for start, count in ((1.0, 4), (9.0, 4)):
        seen = watched_fn(eye * 2, eye * start)[1]
        sizes = [int(s.size) for s in seen.activations.values()]
        rows = list(seen.rows())
        assert all(r["size"] > 0 and np.isfinite(r["rms"]) for r in rows)
        assert 0 < len(rows) <= count and len(rows) == sum(size > 0 for size in sizes)


def test_logits_of_attention() -> None:
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 6, 8)) * 4

    def attend(params: Any, k: Any, v: Any) -> Any:
        with jax.named_scope("attention"):
            scores = jnp.einsum("btk,bsk->bts", params, k) / np.sqrt(8).astype(np.float32)
            masked = jnp.where(jnp.tril(jnp.ones((6, 6), bool))[None], scores, -1e9)
            return jax.nn.softmax(masked) @ v

    found = jax.jit(monitor(attend, formats=[]))(q, k, v)[1].logit_max
    scores = np.einsum("btk,bsk->bts", q, k) / np.sqrt(8)
    kept = np.where(np.tril(np.ones((6, 6))), scores, -np.inf)
    assert float(found["attention"]) == pytest.approx(kept.max(), rel=1e-5)
    plain = jax.jit(monitor(lambda p, x: jnp.max(p @ x), formats=[]))
    assert not plain(q[0], k[0].T)[1].logit_max


@functools.cache
def trained(loop: str) -> Any:
    model = decoder("tiny", "fp16", layers=2, width=16, heads=2, context=8, loop=loop)
    return build(model, optax.adam(1e-3), clip=1.0)


def batch(seed: int) -> Any:
    ids = jax.random.randint(jax.random.key(seed), (2, 9), 0, 256)
    return {"inputs": ids[:, :-1], "targets": ids[:, 1:]}


def test_training_is_the_same_bits_and_nothing_is_compiled_again(tmp_path: Path) -> None:
    _, step = trained("scan")
    writer = TensorWriter(tmp_path)
    sizes: list[int] = []
    seen: list[int] = []

    def report(number: int, stats: Monitored) -> None:
        writer.write(number, stats)
        seen.append(number)

    ends = []
    for mine in (step, watched(step, report, every=2, formats=["e4m3"])):
        state = step.init(0)
        for number in range(1, 6):
            state, metrics = mine(state, batch(number))
            sizes.append(step.compiled._cache_size())
        ends.append((jax.device_get(state), jax.device_get(metrics)))
    assert same(*ends)
    assert set(sizes) == {1}
    assert seen == [1, 2, 4]
    writer.close()
    (events,) = (tmp_path / "tensorboard" / "tensors").iterdir()
    raw = events.read_bytes()
    weight = b"weights/decoder/layers/mlp/up/kernel/0"
    assert all(weight + end in raw for end in (b"/amax", b"/underflow/e4m3", b"/log2"))
    records = read_metrics(tmp_path / "monitor.jsonl")
    assert {r["step"] for r in records} == {1, 2, 4}
    names = {r["name"] for r in records if r["kind"] == "activations"}
    assert {"decoder/layers/mlp/up:product", "decoder/head:product"} <= names
    row = next(r for r in records if r["name"] == "decoder/layers/mlp/up/kernel")
    assert row["layer"] == 0
    assert sum(row["histogram"]) == row["size"] == 16 * 64
    weights = ends[0][0].params["decoder"]["embed"]["table"]
    assert any(r["name"] == "decoder/embed/table" and r["size"] == weights.size for r in records)
    again = TensorWriter(tmp_path, start=2)
    again.close()
    assert {r["step"] for r in read_metrics(tmp_path / "monitor.jsonl")} == {1, 2}


def test_unrolled_and_scanned_layers_have_the_same_names() -> None:
    found: dict[str, Any] = {}
    for loop in ("scan", "unroll"):
        state, step = trained(loop)
        found[loop] = jax.eval_shape(watching(step.function), state, batch(0))[1]
    scan, unrolled = found["scan"], found["unroll"]
    for kind in ("weights", "gradients", "updates", "unchanged", "gradient_ratio"):
        assert getattr(scan, kind) == getattr(unrolled, kind)
    assert scan.gradients["decoder/layers/mlp/up/kernel"].layers == (2,)
    for kind in ("activations", "activation_gradients"):
        expected = set()
        for name, s in getattr(scan, kind).items():
            for layer in range(*s.layers or (0,)):
                expected.add(name.replace("/layers", f"/layers/{layer}"))
            expected |= set() if s.layers else {name}
        assert expected == set(getattr(unrolled, kind))
    assert scan.logit_max["decoder/layers/attention"].shape == (2,)


def test_where_and_what_select() -> None:
    params, x = small()
    only = monitor(jax.grad(loss), where="net/up", what=["activations"], formats=["e4m3"])
    stats = jax.jit(only)(params, x)[1]
    assert {name.split(":")[0] for name in stats.activations} == {"net/up"}
    assert not any(getattr(stats, f) for f in Monitored._fields if f != "activations")
    rows = list(stats.rows())
    assert {r["kind"] for r in rows} == {"activations"}
    assert json.dumps(rows[0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"what": ["weight"]}, "must be a list of: weights activations"),
        ({"what": "weights"}, "must be a list"),
        ({"formats": ["e4m9x"]}, "unknown name 'e4m9x'"),
        ({"formats": "e4m3"}, r"write formats=\['e4m3'\]"),
        ({"formats": ["e4m3", "e4m3"]}, "named twice"),
        ({"formats": ["e8m0"]}, "holds scales"),
        ({"sample": -1}, "sample=-1 must be a whole number, not negative"),
        ({"where": "nett/up"}, "near misses: .*net/up"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        monitor(loss, **options)(*small())


def test_other_errors() -> None:
    with pytest.raises(ConfigError, match="is not a function"):
        monitor(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot be traced"):
        monitor(lambda p, x: p if float(x) > 0 else -p)(jnp.ones(2), jnp.ones(()))
    stats = jax.jit(monitor(loss, formats=["e4m3", "bf16"]))(*small())[1]
    with pytest.raises(ConfigError, match="'e3m2' was not measured; measured: e4m3 bf16"):
        stats.weights["up"].underflow("e3m2")
    with pytest.raises(ConfigError, match="'bf16' was not measured with a scale"):
        stats.weights["up"].sqnr("bf16", scaled=True)
    with pytest.raises(ConfigError, match="monitor_every: 0 must be at least 1"):
        watched(trained("scan")[1], print, every=0)


def test_gradients_in_linens_collection_are_no_new_weights() -> None:
    params = {"params": {"w": jnp.ones((3, 2))}}

    def loss(params: Any, x: Any) -> Any:
        return jnp.square(x @ params["params"]["w"]).sum()

    def step(params: Any, x: Any) -> Any:
        grads = jax.grad(loss)(params, x)
        return jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)

    for fn, updates in ((jax.grad(loss), []), (step, ["w"])):
        _, stats = jax.jit(monitor(fn))(params, jnp.ones((4, 3)))
        assert list(stats.updates) == updates
        assert list(stats.gradients) == ["w"]
