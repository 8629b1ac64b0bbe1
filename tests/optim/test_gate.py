"""The finite gate: global, exact, and able to say where."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mpjax.optim import GateState, all_finite, finite_by_leaf, leaf_path, select
from mpjax.optim.gate import bits, record

LOW = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2]


def patterns(dtype: Any) -> jax.Array:
    """Every bit pattern of a dtype of at most 16 bits; for float32 the upper 16 vary."""
    if dtype == jnp.float32:
        numbers = (np.arange(2**16, dtype=np.uint32) << 16) | 0x1234
    else:
        width = jnp.finfo(dtype).bits
        numbers = np.arange(2**width).astype(f"uint{width}")
    return jax.lax.bitcast_convert_type(jnp.asarray(numbers), dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_select_keeps_every_bit_pattern(dtype: Any) -> None:
    old = {"w": patterns(dtype), "n": jnp.arange(3)}
    new = jax.tree.map(jnp.zeros_like, old)
    chosen = jax.jit(select)
    for finite, expected in ((False, old), (True, new)):
        out = chosen(jnp.bool_(finite), new, old)
        assert np.array_equal(bits(out["w"]), bits(expected["w"]))
        assert np.array_equal(out["n"], expected["n"])


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="XLA keeps the bits there")
def test_a_plain_where_does_not() -> None:
    """Why select works on bits: on CPU bfloat16 passes through float32."""
    old = patterns(jnp.bfloat16)
    out = jax.jit(lambda f, a, b: jnp.where(f, a, b))(jnp.bool_(False), jnp.zeros_like(old), old)
    nan = np.isnan(np.asarray(old, np.float32))
    assert np.array_equal(bits(out)[~nan], bits(old)[~nan])
    assert not np.array_equal(bits(out), bits(old))


def test_select_takes_random_keys() -> None:
    old, new = jax.random.key(0), jax.random.key(1)
    out = select(jnp.bool_(False), new, old)
    assert np.array_equal(jax.random.key_data(out), jax.random.key_data(old))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_each_leaf_says_whether_it_is_finite(dtype: Any, bad: float) -> None:
    tree = {
        "a": jnp.ones(3, dtype),
        "b": jnp.ones((2, 2), dtype).at[1, 0].set(bad),
        "n": jnp.int32(1),
    }
    assert finite_by_leaf(tree).tolist() == [True, False, True]
    assert not bool(all_finite(tree))
    tree["b"] = jnp.full((2, 2), jnp.finfo(dtype).max, dtype)
    assert bool(all_finite(tree))  # the largest number is finite


def test_an_empty_tree_is_finite() -> None:
    assert bool(all_finite({}))


def test_one_bad_shard_is_seen_by_all_devices() -> None:
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = NamedSharding(mesh, PartitionSpec("fsdp"))
    check = jax.jit(all_finite, out_shardings=NamedSharding(mesh, PartitionSpec()))
    x = np.ones((16, 2), np.float32)
    assert bool(check({"w": jax.device_put(x, sharded)}))
    for row in (0, 7, 15):
        bad = x.copy()
        bad[row, 1] = np.nan
        out = check({"w": jax.device_put(bad, sharded)})
        assert len(out.sharding.device_set) == 8
        assert [bool(shard.data) for shard in out.addressable_shards] == [False] * 8


def test_record_counts_skips_and_those_at_the_minimum() -> None:
    ok, bad = jnp.array([True, True, True]), jnp.array([True, False, False])
    state = GateState.zero()
    seen = []
    for leaves, at_minimum in [(ok, 0), (bad, 0), (bad, 1), (bad, 1), (ok, 1), (bad, 1), (bad, 0)]:
        state = record(state, leaves, jnp.bool_(at_minimum))
        seen.append(tuple(x.item() for x in state))
    assert seen == [
        (0, 0, -1),
        (1, 0, 1),  # the scale could still fall
        (2, 1, 1),
        (3, 2, 1),
        (3, 0, 1),  # a finite step
        (4, 1, 1),
        (5, 0, 1),
    ]
    assert [x.dtype for x in state] == [jnp.int32] * 3


def test_leaf_path_counts_as_finite_by_leaf_does() -> None:
    tree = {"b": [jnp.ones(1), jnp.full(1, jnp.nan)], "a": (jnp.ones(1),)}
    index = int(jnp.argmin(finite_by_leaf(tree)))
    assert leaf_path(tree, index) == "b/1"
