"""A file of quantised weights: bit for bit, packed, and refused when broken."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models import load_weights, quantize_weights, save_weights
from mpjax.models.storage import stored_bytes
from mpjax.models.weight_file import pack, unpack
from tests.models.shapes import small, stirred

safetensors = pytest.importorskip("safetensors", reason="the extra hub is not installed")
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("dtype", ["int4", "int2", "float4_e2m1fn", "float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 5), (8,)])
def test_packing_keeps_every_number(dtype: str, shape: tuple[int, ...]) -> None:
    numbers = np.random.default_rng(0).integers(-2, 2, shape).astype(np.float32)
    array = np.asarray(jnp.asarray(numbers).astype(dtype))
    packed = pack(array)
    assert np.array_equal(unpack(packed, dtype, shape), array)
    bits = {"int4": 4, "int2": 2, "float4_e2m1fn": 4, "float8_e4m3fn": 8, "bfloat16": 16}[dtype]
    assert packed.nbytes == -(-array.size * bits // 8)
    assert (array.astype(np.float32) < 0).any(), "signs are tried"


@pytest.mark.parametrize(
    "storage", ["int4@8", "int4@8+offset", "int8", "e4m3", "e2m1@nv(16)", "e3m2", "bf16"]
)
def test_weights_come_back_bit_for_bit(tmp_path, storage: str) -> None:
    stored = quantize_weights(stirred(small()), storage)
    size = save_weights(stored, tmp_path / "w.safetensors")
    again = load_weights(tmp_path / "w.safetensors")
    assert jax.tree.structure(again) == jax.tree.structure(stored)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(stored), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert 0 <= size - stored_bytes(stored) < 8000, "a page of names beside the numbers"


def test_broken_files_are_one_line(tmp_path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights({"w": jnp.ones((4, 4))}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ConfigError, match="damaged"):
        load_weights(path)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ConfigError, match="damaged"):
        load_weights(path)
    import safetensors.numpy

    path.write_bytes(safetensors.numpy.save({"w": np.ones(2, np.float32)}))
    with pytest.raises(ConfigError, match="not a file of save_weights"):
        load_weights(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_weights(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_weights({"w": jnp.ones(2)}, tmp_path / "none" / "w")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.safetensors"], "nothing half-written"
