"""Hostile GGUF files, safetensors, indices and settings: refused before they cost anything."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models.hf import load_checkpoint, open_checkpoint
from tests.bounds import bounded, refused
from tests.models.hf import cases, ours
from tests.models.hf.test_gguf import SHAPES, write


def _head(tensors: int, fields: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields)


def _field(kind: int, value: bytes, name: bytes = b"a.b") -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def _tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + axes + struct.pack("<IQ", kind, offset)


GGUFS = {
    "2^64 fields": (_head(0, 2**64 - 1), "8 bytes at 24, of 24"),
    "2^64 tensors": (_head(2**64 - 1, 0), "8 bytes at 24, of 24"),
    "a name of 2^63": (_head(0, 1) + struct.pack("<Q", 2**63), "9223372036854775808 bytes at 32"),
    "a list of 2^60 bytes": (
        _head(0, 1) + _field(9, struct.pack("<IQ", 0, 2**60)), "1152921504606846976 bytes at",
    ),
    "a list of 2^60 texts": (
        _head(0, 1) + _field(9, struct.pack("<IQ", 8, 2**60)), "1152921504606846976 texts",
    ),
    "lists in lists": (_head(0, 1) + _field(9, struct.pack("<IQ", 9, 1) * 10**4), "list of type 9"),
    "a value of no type": (_head(0, 1) + _field(77, b""), "a value of type 77"),
    "a field twice": (_head(0, 2) + _field(0, b"\1") * 2, "the setting a.b twice"),
    "2^32 axes": (
        _head(1, 0) + struct.pack("<Q", 1) + b"w" + b"\xff" * 4, "with 4294967295 axes",
    ),
    "a shape of 2^62": (_head(1, 0) + _tensor(b"w", (2**62,), 0, 0), "behind the file's end"),
    "a shape of 2^63 by 2^63": (
        _head(1, 0) + _tensor(b"w", (2**63, 2**63), 0, 0), "behind the file's end",
    ),
    "an offset of 2^63": (_head(1, 0) + _tensor(b"w", (1,), 0, 2**63), "behind the file's end"),
    "a tensor over another": (
        _head(2, 0) + _tensor(b"v", (8,), 0, 0) + _tensor(b"w", (8,), 0, 0) + b"\0" * 99,
        "w lies over v",
    ),
    "half a block": (_head(1, 0) + _tensor(b"w", (31,), 2, 0) + b"\0" * 99, "multiple of its bl"),
    "an unknown type": (_head(1, 0) + _tensor(b"w", (32,), 99, 0) + b"\0" * 99, "99 is not a v"),
    "no power of two": (
        _head(0, 1) + _field(4, struct.pack("<I", 3), b"general.alignment"), "no power of two",
    ),
    "no UTF-8": (_head(0, 1) + _field(0, b"\1", b"\xff\xfe"), "can't decode"),
    "another byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUFS)
def test_ggufs_whose_counts_are_not_the_files(name: str, tmp_path: Path) -> None:
    data, message = GGUFS[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with refused(path, message):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", struct.pack("<I", 2**32 - 1), "num_hidden_layers=4294967295; expect"),
        ("llama.block_count", struct.pack("<I", 10**6), "1000000 layers, but .* of 2; take"),
        ("llama.attention.head_count", struct.pack("<I", 0), "num_attention_heads=0; expected"),
        ("llama.attention.head_count_kv", struct.pack("<I", 0), "num_key_value_heads=0; expected"),
        ("llama.attention.head_count_kv", struct.pack("<I", 5), "that of 5 heads with rotary p"),
        ("llama.embedding_length", struct.pack("<I", 0), "hidden_size=0; expected"),
        ("llama.attention.layer_norm_rms_epsilon", b"\0\0\x80\x7f", "rms_norm_eps=inf; expected"),
    ],
)
def test_gguf_settings_that_no_model_has(
    key: str, value: bytes, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.gguf")
    whole = path.read_bytes()
    at = whole.index(key.encode()) + len(key) + 4
    path.write_bytes(whole[:at] + value + whole[at + len(value) :])
    with refused(path, message):
        load_checkpoint(path)


LLAMA = cases.CONFIGS["llama"]
CONFIGS: dict[str, tuple[str, str]] = {
    name: (json.dumps(LLAMA | change), message)
    for name, (change, message) in {
        "10^6 layers": ({"num_hidden_layers": 10**6}, "1000000 layers, but .* of 2; take"),
        "a vocabulary of 10^12": ({"vocab_size": 10**12}, "vocab_size=1000000000000; expected"),
        "a width of 10^400": ({"hidden_size": 10**400}, "hidden_size=an integer of 1329 bits"),
        "an epsilon of 10^400": ({"rms_norm_eps": 10**400}, "rms_norm_eps=an integer of 1329"),
        "an infinite epsilon": ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf; expected"),
        "an epsilon of NaN": ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan; expected"),
        "no heads": ({"num_attention_heads": 0}, "heads=0 must be at least 1"),
        "a list": ({"hidden_size": [16] * 10**5}, r"hidden_size=\[16, 16, .*; expected int"),
        "text": ({"hidden_size": "16"}, "hidden_size='16'; expected int"),
        "a bool": ({"hidden_size": True}, "hidden_size=True; expected int"),
        "no width": ({"hidden_size": None}, "no hidden_size|hidden_size"),
        "40,000 fields": ({f"f{i}\x1b[2J": i for i in range(40_000)}, "and 39992 more, which may"),
        "a long name": ({"f" * 10**6: 1}, "unknown field f.* [.]{3} .*f, which may change"),
        "an escape": ({"model_type": "\x1b]0;x\x07"}, r"unknown architecture '\\x1b"),
    }.items()
} | {
    "deep": ('{"a":' * 10**5, "not JSON .100000 levels deep"),
    "deep lists": ("[" * 990 + "]" * 990, "not JSON .990 levels deep"),
    "a key twice": ('{"hidden_size": 16, "hidden_size": 32}', "the key 'hidden_size' twice"),
    "a number of 5000 digits": (f'{{"hidden_size": 1{"0" * 5000}}}', "Exceeds the limit"),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ours.write("llama", SHAPES, tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_that_no_model_has(name: str, llama: Path) -> None:
    text, message = CONFIGS[name]
    (llama / "config.json").write_text(text)
    with refused(llama / "config.json", message):
        load_checkpoint(llama)


def test_a_byte_order_mark_is_no_mistake(llama: Path) -> None:
    (llama / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    with bounded(llama / "model.safetensors"):
        model, _ = load_checkpoint(llama)
    assert model.config.width == LLAMA["hidden_size"]


def test_names_of_layers_that_are_not_there_cost_nothing(llama: Path, tmp_path: Path) -> None:
    """As many tensors as layers, and none of them a layer's."""
    from safetensors.numpy import save_file

    save_file(
        {str(i): np.zeros(0, np.float32) for i in range(9000)}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 9000}))
    with refused(tmp_path / "model.safetensors", "9000 layers, but .* of 0; take"):
        load_checkpoint(tmp_path)


def test_weights_of_nan_alone_are_named(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = ours.write("llama", SHAPES, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = np.nan  # one is training's doing
    save_file(tensors, folder / "model.safetensors")
    load_checkpoint(folder)
    tensors[name][:] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=f"decoder/layers/mlp/up/kernel: {name} is NaN through"):
        load_checkpoint(folder)


def _safetensors(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 8


@pytest.mark.parametrize(
    "shape", [[-1], [None], [1.5], ["2"], [2**63], [2**32, 2**32], [3], [2, 2], "2", None]
)
def test_shapes_that_the_bytes_do_not_have(shape: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    one = {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}
    path.write_bytes(_safetensors({"w": one}))
    with refused(path, "not a whole safetensors file"):
        open_checkpoint(path)
    path.write_bytes(_safetensors({"w": one | {"shape": [2]}}))
    assert open_checkpoint(path).tensors["w"].read().tolist() == [0.0, 0.0]
    empty = {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}
    path.write_bytes(_safetensors({"e": empty, "w": one | {"shape": [2]}}))
    with refused(path, "e is a tensor of more bytes than can be counted"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "file", ["../a", "/etc/passwd", "..", "a\0", "\x1b[2J", "\ud800", "n" * 10**6, "x/a"]
)
def test_an_index_names_files_of_its_folder(file: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"w": file}}))
    with refused(path, "which is not in its folder|not a whole safetensors file"):
        open_checkpoint(tmp_path)


def test_files_beside_the_weights(tmp_path: Path) -> None:
    folder = ours.write("llama", SHAPES, tmp_path)
    for text, message in (
        ("[" * 10**5, "generation_config.json: not JSON .100000 levels"),
        ("[]", "expected a JSON object, got a list"),
        ('{"a": "\udcff"}', "not JSON .*can't decode"),
    ):
        path = folder / "generation_config.json"
        path.write_text(text, errors="surrogateescape")
        with refused(path, message):
            load_checkpoint(folder)
    (folder / "generation_config.json").unlink()
    large = folder / "chat_template.jinja"
    with large.open("wb") as file:
        file.truncate(2**26 + 1)
    with refused(large, "expected at most 67108864 of a file beside the weights"):
        load_checkpoint(folder)
