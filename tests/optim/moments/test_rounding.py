"""Stochastic rounding of moments: its mean, its bits, and that a second moment can fall."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mpjax.errors import ConfigError
from mpjax.optim import quantize_blocks, quantize_moments, wrap
from mpjax.optim.moments.blockwise import code_book, encode, round_moment
from mpjax.optim.moments.dither import dither_key
from mpjax.optim.moments.low_moments import widen
from mpjax.precision import Moments, get_precision, preset_names
from mpjax.train import parse_mesh
from tests.optim.scaled_step import scaled_step

pytestmark = pytest.mark.usefixtures("fast_compile")

DRAWS = 4096
BOOKS = [(n, s) for n in ("int8", "int4", "int8-linear") for s in (True, False)]


def draws(function: Any, x: np.ndarray) -> np.ndarray:
    """The function of many copies of each number, all rounded by bits of their own."""
    key = jax.random.fold_in(dither_key("test", 3), 1)
    copies = jnp.asarray(np.repeat(x.astype(np.float32)[:, None], DRAWS, 1))
    return np.asarray(jax.jit(function)(copies, key)).astype(np.float64)


def require_neighbours_and_mean(x: np.ndarray, got: np.ndarray, numbers: np.ndarray) -> None:
    """Each draw is one of the two neighbours; their mean is x within five standard errors."""
    numbers = np.sort(numbers.astype(np.float64))
    place = np.clip(np.searchsorted(numbers, x, side="right") - 1, 0, len(numbers) - 2)
    low, high = numbers[place], numbers[place + 1]
    near = np.isclose(got, low[:, None], rtol=1e-6) | np.isclose(got, high[:, None], rtol=1e-6)
    share = np.clip((x - low) / (high - low), 0, 1)
    error = (high - low) * (5 * np.sqrt(share * (1 - share) / DRAWS) + 2e-3)
    assert near.mean() > 0.9999  # float32 may tip a number of the book itself
    assert (np.abs(got.mean(1) - x) <= error).all()


@pytest.mark.parametrize(("name", "signed"), BOOKS)
def test_a_number_becomes_one_of_its_neighbours_and_its_mean_is_kept(
    name: str, signed: bool
) -> None:
    rng, book = np.random.default_rng(0), np.sort(code_book(name, signed).astype(np.float64))
    book = np.unique(book)
    x = np.concatenate([rng.uniform(0, 1, 40), 10 ** rng.uniform(-7, 0, 60), book[::9], [0.0]])
    x = np.concatenate([x, -x]) if signed else x
    x = np.clip(x.astype(np.float32).astype(np.float64), book[0], book[-1])
    numbers = jnp.asarray(code_book(name, signed))

    def rounded(x: Any, key: Any) -> Any:
        return numbers[encode(x, name, signed, key).astype(jnp.int32)]

    got = draws(rounded, x)
    if not signed:  # what is above zero stays above zero
        first = book[book > 0][0]
        low = (x > 0) & (x < first)
        assert (got[low] == np.float32(first)).all() and (got[x == 0] <= first).all()
        x, got = x[~low], got[~low]
    require_neighbours_and_mean(x, got, book)
    assert np.abs(got - x[:, None]).max() > 0  # something was rounded


@pytest.mark.parametrize("name", ["bfloat16", "float16", "e4m3", "e5m2"])
def test_floats_are_rounded_to_neighbours_with_their_mean(name: str) -> None:
    kinds = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2,
             "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}  # fmt: skip
    kind = np.dtype(kinds[name])
    numbers = np.arange(2 ** (8 * kind.itemsize), dtype=f"uint{8 * kind.itemsize}").view(kind)
    numbers = np.unique(numbers[np.isfinite(numbers.astype(np.float32))].astype(np.float64))
    x = np.random.default_rng(1).normal(size=60) * 10.0 ** np.linspace(-6, 1, 60)
    x = x.astype(np.float32).astype(np.float64)
    require_neighbours_and_mean(
        x, draws(lambda x, key: round_moment(x, name, True, key), x), numbers
    )
    tiny = np.array([0.0, 1e-3, 0.4]) * numbers[numbers > 0][0]
    above = draws(lambda x, key: round_moment(x, name, False, key), tiny)
    if name != "bfloat16":  # whose subnormal numbers are float32's, which XLA takes for zero
        assert (above[1:] == numbers[numbers > 0][0]).all() and (above[0] == 0).all()


@pytest.mark.parametrize("text", ["int8@64", "int4@64", "e4m3@64", "e5m2@64"])
def test_the_mean_of_a_block_is_kept_whatever_its_absmax_does(text: str) -> None:
    """Also of its largest number when that is negative, for which a tree has no code."""
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(2, 64)) * [[1.0], [30.0]]).astype(np.float32)
    x[0, 5] = -3.7
    keys = jax.random.split(dither_key("test", 1), 2048)
    run = jax.jit(jax.vmap(lambda k: quantize_blocks(x, text, True, k).dequantize()))
    got = np.asarray(run(keys)).astype(np.float64)
    spread = got.std(0) / np.sqrt(len(keys))
    assert (np.abs(got.mean(0) - x) <= 5 * spread + 1e-5 * np.abs(x).max()).all()
    np.testing.assert_allclose(got[:, 0, 5], -3.7, rtol=1e-6)
    again = quantize_blocks(x, text, True).dequantize()  # the control: nearest is off for good
    assert np.abs(np.asarray(again) - x).max() > 30 * spread.max() or text == "int8@64"


def lowbias32(shape: tuple[int, ...], key: Any) -> np.ndarray:
    """Wellons' hash of the flat index, in NumPy."""
    a, b = (np.uint32(word) for word in np.asarray(jax.random.key_data(key)))
    x = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape) ^ a
    x = ((x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)) ^ b
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def test_the_bits_are_the_hashs_and_have_no_pattern() -> None:
    first, second = (jax.random.fold_in(dither_key("moments", n), 7) for n in (0, 1))
    bits = [np.asarray(jax.random.bits(key, (64, 512))) for key in (first, second)]
    assert np.array_equal(bits[0], lowbias32((64, 512), first))
    unit = [x / 2.0**32 for x in bits]
    n = unit[0].size
    for u in unit:
        assert abs(u.mean() - 0.5) < 4 / np.sqrt(12 * n)
        assert abs(np.histogram(u, 64)[0] - n / 64).max() < 5 * np.sqrt(n / 64)
        for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):  # neighbours
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(unit[0].ravel(), unit[1].ravel())[0, 1]) < 4 / np.sqrt(n)  # two steps


# A second moment that falls.

HIGH, SMALL, B2, STEPS = 50, 0.01, 0.999, 1500
FALLING = ("second=bf16", "second=int8@64", "second=e4m3@64", "second=e5m2@64")


@pytest.fixture(scope="module")
def fallen() -> dict[str, float]:
    """Mean second moment after gradients of 1 and then 0.01, by storage; a block keeps its 1."""
    texts = [f"{text},rounding={r}" for text in FALLING for r in ("stochastic", "nearest")]
    moments = [Moments.parse(text) for text in texts]
    runs = [quantize_moments(optax.adam(1.0, b2=B2), second=m.second, rounding=m.rounding)
            for m in moments]  # fmt: skip
    first, w = jnp.arange(64) == 0, {"w": jnp.zeros((32, 64))}

    def body(states: Any, n: Any) -> Any:
        g = {"w": jnp.broadcast_to(jnp.where(first | (n < HIGH), 1.0, SMALL), (32, 64))}
        with jax.numpy_dtype_promotion("standard"):
            return [tx.update(g, s)[1] for tx, s in zip(runs, states, strict=True)], None

    states = [tx.init(w) for tx in runs]
    states = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(STEPS))[0])(states)
    ends = [np.asarray(widen(s, frozenset())[0].nu["w"])[:, 1:] for s in states]
    return {text: float(x.astype(np.float64).mean()) for text, x in zip(texts, ends, strict=True)}


@pytest.mark.parametrize("text", FALLING)
def test_a_second_moment_can_fall(fallen: dict[str, float], text: str) -> None:
    v = 0.0
    for n in range(STEPS):
        v = B2 * v + (1 - B2) * (1.0 if n < HIGH else SMALL) ** 2
    assert fallen[f"{text},rounding=stochastic"] == pytest.approx(v, rel=0.08)
    assert fallen[f"{text},rounding=nearest"] > 2 * v  # the control


# Steps, leaves, devices.


def raw(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_bits_are_those_of_the_step_and_the_leaf() -> None:
    tx = quantize_moments(optax.sgd(0.1, momentum=0.9), first="int4@8")
    g = {k: jax.random.normal(jax.random.key(1), (8, 32)) for k in "ab"}
    run = jax.jit(tx.update)
    state = tx.init(g)
    once, again = run(g, state)[1], run(g, state)[1]
    assert raw(once) == raw(again) and int(once.draws) == 1
    trace = once.inner[0].trace
    assert raw(trace["a"].codes) != raw(trace["b"].codes)  # two leaves of the same numbers
    later = run(g, state._replace(draws=jnp.int32(5)))[1]
    assert raw(later.inner) != raw(once.inner)
    alone = run({"b": g["b"]}, tx.init({"b": g["b"]}))[1]  # another leaf's presence changes nothing
    assert raw(alone.inner[0].trace["b"]) == raw(trace["b"])
    nearest = quantize_moments(optax.sgd(0.1, momentum=0.9), first="int4@8", rounding="nearest")
    still = nearest.update(g, nearest.init(g))[1]
    assert raw(still.inner[0].trace["a"]) == raw(still.inner[0].trace["b"]) and still.draws == 0


def test_a_skipped_step_draws_nothing_and_the_next_draws_its_bits() -> None:
    opt = wrap(optax.adam(0.1), get_precision("fp32", moments="int8", loss_scale="dynamic"))
    w = {"w": jax.random.normal(jax.random.key(0), (4, 8))}
    step = scaled_step(opt)
    w, state = step(w, opt.init(w), w)
    bad = {"w": w["w"].at[0, 0].set(jnp.nan)}
    kept, skipped = step(bad, state, w)
    assert raw((kept, skipped.inner)) == raw((w, state.inner)) and int(skipped.inner.draws) == 1
    ahead = step(w, state, w)
    # The loss scale has halved; all else is as if the skipped step had not been.
    skipped = skipped._replace(loss_scale=state.loss_scale)
    assert raw(step(w, skipped, kept)[1].inner) == raw(ahead[1].inner)


def test_shards_draw_the_bits_of_the_whole() -> None:
    mesh = parse_mesh("fsdp=8")
    key = jax.random.fold_in(dither_key("moments", 2), 3)
    store = jax.jit(lambda x: quantize_blocks(x, "int8@64", True, key))
    x = jax.random.normal(jax.random.key(0), (16, 64))
    cut = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp", None)))
    everywhere = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    assert raw(store(cut)) == raw(store(everywhere)) == raw(store(x))
    same = store(jnp.broadcast_to(x[:1], x.shape))
    assert len({row.tobytes() for row in np.asarray(same.codes)}) == 16  # shards draw their own


# What is written.


def test_rounding_is_read_and_written() -> None:
    assert str(Moments.parse("int8,rounding=nearest")) == "int8@256,rounding=nearest"
    assert str(Moments.parse("int8,rounding=stochastic")) == "int8@256"
    assert Moments.parse("int8,rounding=nearest") != Moments.parse("int8")
    precision = get_precision("bf16", moments="int8@256,rounding=nearest")
    assert get_precision(precision.to_text()) == precision == get_precision(precision.to_json())
    for text, message in (("int8,rounding=up", "rounding='up' is unknown; write stochastic or"),
                          ("f32,rounding=nearest", "but both are float32")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            Moments.parse(text)


def test_a_presets_pattern_may_match_nothing_and_a_users_must() -> None:
    own = {"w": jnp.ones((2, 3))}
    precision = get_precision("adam8bit")
    for same in (precision, get_precision(precision.to_text()), get_precision(precision.to_json())):
        state = wrap(optax.adam(0.1), same).init(own)
        assert state.inner.inner[0].mu["w"].format.name == "int8"
    assert str(precision.moments) == "int8@256,keep=**/embed"
    with pytest.raises(ConfigError, match="keep=\\*\\*/embed matches no weight"):
        wrap(optax.adam(0.1), get_precision("bf16", moments=str(precision.moments))).init(own)
    low = {"w": own["w"].astype(jnp.bfloat16)}
    for name in preset_names():  # every preset takes a tree of the user's own
        precision = get_precision(name)
        params = low if precision.update != "none" else own
        jax.eval_shape(wrap(optax.adam(0.1), precision).init, params)
