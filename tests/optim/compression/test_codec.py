"""What is sent of numbers: their values, their bytes, and what NumPy says of both."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpjax.errors import ConfigError
from mpjax.optim.compression.codec import make_codec, message_bytes, pack_bits, unpack_bits
from mpjax.precision import Compression

FORMATS = (
    "bf16",
    "f16",
    "int8@64",
    "int4@64",
    "e4m3@64",
    "e5m2@64",
    "sign@64",
    "int8@64,prune=0.75",
)


def _numbers(seed: int, rows: int = 3, width: int = 256) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, width)) * 10.0 ** rng.integers(-6, 3, (rows, width // 64)).repeat(
        64, 1
    )
    return x.astype(np.float32)


def _oracle(text: str, x: np.ndarray) -> np.ndarray:
    """The same in NumPy, in float64 but for the division."""
    c = Compression.parse(text)
    if c.kind == "dtype":
        return x.astype({"bf16": ml_dtypes.bfloat16, "f16": np.float16}[c.name]).astype(np.float32)
    blocks = x.reshape(-1, c.block)
    if c.kind == "sign":
        mean = np.abs(blocks.astype(np.float64)).mean(-1, keepdims=True)
        return np.where(blocks >= 0, mean, -mean).reshape(x.shape)
    keep = np.ones(blocks.shape, bool)
    if c.prune:
        order = np.argsort(-np.abs(blocks), axis=-1, kind="stable")
        np.put_along_axis(keep, order[:, c.sent :], False, axis=-1)
    held = np.where(keep, blocks, 0)
    top = {"int8": 127, "int4": 7, "e4m3": 448, "e5m2": 57344}[c.name]
    scale = np.abs(held).max(-1, keepdims=True) / np.float32(top)
    scaled = held / np.where(scale == 0, np.float32(1), scale)
    if c.name.startswith("int"):
        rounded = np.clip(np.rint(scaled), -top - 1, top)
    else:
        dtype = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[c.name]
        rounded = np.clip(scaled, -top, top).astype(dtype).astype(np.float32)
    return (rounded * scale).reshape(x.shape)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_message_says_what_numpy_says(text: str, seed: int) -> None:
    codec, x = make_codec(Compression.parse(text)), _numbers(seed)
    x[1] = 0  # a row of zeros
    got = jax.jit(lambda x: codec.decode(codec.encode(x)))(jnp.asarray(x))
    want = _oracle(text, x)
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-30)
    assert np.abs(want - x).max() > 0  # a codec that sends float32 would not be one


@pytest.mark.parametrize(
    ("text", "bits"),
    [("bf16", 16), ("int8@256", 8.125), ("e4m3@256", 8.125), ("int4@64", 4.5),
     ("sign@1024", 33 / 32), ("int8@256,prune=0.75", 1 + 2 + 0.125)],
)  # fmt: skip
def test_bits_a_number(text: str, bits: float) -> None:
    assert message_bytes(make_codec(Compression.parse(text)), 2, 8192) == 2 * 8192 * bits / 8


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_bits_are_packed_and_unpacked(seed: int, bytes_: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2, (2, 8 * bytes_)).astype(bool)
    packed = pack_bits(jnp.asarray(bits))
    np.testing.assert_array_equal(packed, np.packbits(bits, axis=-1, bitorder="little"))
    np.testing.assert_array_equal(unpack_bits(packed), bits)


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_number_beyond_the_dtype_is_its_largest(dtype: str) -> None:
    codec = make_codec(Compression.parse(dtype))
    got = codec.decode(codec.encode(jnp.array([[3.4e38, -3.4e38]])))
    assert np.isfinite(got).all()


@pytest.mark.parametrize("text", ["none", *FORMATS, "topk:0.01,momentum=0.9,warmup=5", "powersgd:4",
                                  "sign@64,momentum=0.9,warmup=20,feedback=off,min=0"])  # fmt: skip
def test_text_reads_what_it_writes(text: str) -> None:
    assert Compression.parse(str(Compression.parse(text))) == Compression.parse(text)


WRONG: dict[Any, str] = {
    "int9": "did you mean int",
    "": "unknown form ''",
    "int8@0": "at least 1",
    "int8@12": "no multiple of 8",
    "int8@x": "'x' is no number",
    "topk": "not complete",
    "topk:0": "between 0 and 1",
    "topk:2": "between 0 and 1",
    "powersgd:0": "at least 1",
    "powersgd:1.5": "no whole number",
    "int8,momentum=0.9": "bad option 'momentum=0.9'",
    "int8,feedback=maybe": "feedback=on",
    "int8,prune=1": "1 left out",
    "int8,prune=0.1,prune=0.2": "bad option",
    "bf16@8": "does not read block",
    "powersgd:4,feedback=off": "bad option",
    3: "is no text",
    None: "is no text",
}


@pytest.mark.parametrize("value", WRONG)
def test_a_wrong_text_is_one_line(value: Any) -> None:
    with pytest.raises(ConfigError, match="compression: ") as error:
        Compression.parse(value)
    assert WRONG[value] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields", [{"name": "int8", "share": 0.1}, {"name": "topk"}, {"name": "sign", "feedback": 1},
               {"name": "int8", "block": 2.5}, {"name": "bf16", "least": -1}, {"name": "powersgd"}]
)  # fmt: skip
def test_a_wrong_field_is_one_line(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="compression: "):
        Compression(**fields)
