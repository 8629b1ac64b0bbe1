"""A file of quantised weights: bit for bit, packed, and refused when broken."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models import load_weights, quantize_weights, save_weights
from mpjax.models.core.storage import stored_bytes
from mpjax.models.inference.weight_file import pack, unpack
from tests.bounds import refused
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


def _said(path, change) -> None:
    """Writes a file anew with another page of names, beside the same numbers."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    page = json.loads(header["__metadata__"]["mpjax"])
    header["__metadata__"]["mpjax"] = json.dumps(change(page))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


FALSE = {
    "no page": (lambda page: [], "not a file of save_weights"),
    "no weights": (lambda page: page | {"weights": None}, "lists no weights"),
    "deep": (lambda page: page | {"weights": [[[]] * 60] * 60}, "lists no weights"),
    "text": (lambda page: page | {"weights": {"b": "x"}}, "b is described by 'x'"),
    "nothing": (lambda page: page | {"weights": {"b": {}}}, "b is described by None"),
    "another name": (lambda page: _with(page, "c", page["weights"]["b"]), "c"),
    "in another": (lambda page: _with(page, "b/c", page["weights"]["b"]), "b/c"),
    "a path of 10^5 parts": (
        lambda page: {"version": 1, "weights": {"/" * 10**5: {}}},
        "described",
    ),
}
PARTS = {
    "array": (
        ["float32", [-1]], ["float32", [None]], ["float32", [3.0]], ["float32", 3],
        ["float32", [4]], ["float32", [True]], ["float32", [2**62]], ["float32", [1] * 40],
        ["int32", [3]], ["bfloat16", [3]], ["object", [3]], ["S4", [3]], ["datetime64", [3]],
        [None, [3]], [3], 1, ["float64", [3]], ["float32", [3, 1]], ["\x1b[2J", [3]],
    ),
    "array#values": (["int4", [63, 4]], ["int8", [64, 4]], ["int4", [64, 5]], ["int2", [64, 4]]),
    "array#scales": (["float32", [4, 2]], ["float32", [8]], ["float32", [2, 4, 1]]),
    "tile": ([], [32], [0, 1], [-1, 1], [31, 1], [32, 1, 1, 1], None, "32", [32.0, 1], [True, 1]),
    "format": (None, 4, [], "int5x", "e" * 10**5),
    "dtype": (None, [], "object", "S4", "nothing"),
    "scale_bits": (None, "32", 1.5, []),
}  # fmt: skip


def _with(page, name, about):
    return page | {"weights": page["weights"] | {name: about}}


@pytest.fixture
def described(tmp_path):
    path = tmp_path / "w.safetensors"
    tree = {"a": {"kernel": jnp.ones((64, 4))}, "b": jnp.arange(3.0)}
    save_weights(quantize_weights(tree, "int4@32"), path)
    return path


@pytest.mark.parametrize("name", FALSE)
def test_pages_that_list_something_else(name: str, described) -> None:
    change, message = FALSE[name]
    _said(described, change)
    with refused(described, message):
        load_weights(described)


@pytest.mark.parametrize("part", PARTS)
def test_weights_stored_other_than_described(part: str, described) -> None:
    whole = described.read_bytes()
    name = "b" if part == "array" else "a/kernel"
    for value in PARTS[part]:
        _said(described, lambda p, v=value: _with(p, name, p["weights"][name] | {part: v}))
        with refused(described, f"damaged .*{name}"):
            load_weights(described)
        described.write_bytes(whole)
    assert load_weights(described)["b"].tolist() == [0.0, 1.0, 2.0]


def test_a_weight_does_not_lie_inside_another(described) -> None:
    other = described.with_name("other")
    import safetensors.numpy

    numbers = {n: np.ones(1, np.float32) for n in ("b", "b/c", "d/" * 80 + "e")}
    for names, message in (
        (("b", "b/c"), "lies inside another weight"),
        (("b/c", "b"), "other weights inside"),
        (("d/" * 80 + "e",), "has 81 parts"),
    ):
        page = {"version": 1, "weights": {n: {"array": ["float32", [1]]} for n in names}}
        held = {n: numbers[n] for n in names}
        other.write_bytes(safetensors.numpy.save(held, {"mpjax": json.dumps(page)}))
        with refused(other, message):
            load_weights(other)
