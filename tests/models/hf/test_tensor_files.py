"""Safetensors, whole and in shards; what is truncated, absent or of another kind is refused."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mpjax.errors import ConfigError
from mpjax.models.hf.checkpoint import open_checkpoint
from tests.models.hf.torch_writer import save_zipped

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.ones(4, ml_dtypes.bfloat16),
    "ids": np.arange(5),
}
INDEX = "model.safetensors.index.json"


def shards(folder: Path) -> dict[str, str]:
    """Two files and the map of names."""
    save_file({"a": ARRAYS["a"]}, folder / "one.safetensors")
    save_file({n: ARRAYS[n] for n in ("b", "ids")}, folder / "two.safetensors")
    return {"a": "one.safetensors", "b": "two.safetensors", "ids": "two.safetensors"}


def test_whole_and_sharded_files_give_the_same(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards(tmp_path)}))
    save_file(ARRAYS, tmp_path / "whole.safetensors")
    for source in (tmp_path, tmp_path / INDEX, tmp_path / "whole.safetensors"):
        tensors = open_checkpoint(source).tensors
        assert set(tensors) == set(ARRAYS)
        for name, x in ARRAYS.items():
            np.testing.assert_array_equal(tensors[name].read(), x, strict=True)
            assert (tensors[name].shape, tensors[name].dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize("end", [0, 7, 60, -1])
def test_a_truncated_file_is_refused(end: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(ARRAYS, path)
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ConfigError, match=r"model\.safetensors: not a whole .*; fetch it again$"):
        open_checkpoint(tmp_path)


def test_broken_indices_are_refused(tmp_path: Path) -> None:
    whole = shards(tmp_path)
    outside = tmp_path / "inner"
    outside.mkdir()
    for broken, message in [
        ({}, "no weight_map"),
        ({"weight_map": whole | {"c": "two.safetensors"}}, "c not in the files that it names"),
        ({"weight_map": {"b": "two.safetensors"}}, "ids in the files but not in it"),
        ({"weight_map": whole | {"c": "three.safetensors"}}, "three.safetensors: not a whole"),
        ({"weight_map": {"a": "../one.safetensors"}}, "which is not in its folder"),
        ([], "expected a JSON object, got a list"),
    ]:
        (tmp_path / INDEX).write_text(json.dumps(broken))
        with pytest.raises(ConfigError, match=message):
            open_checkpoint(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        open_checkpoint(tmp_path)


def test_quantised_tensors_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.ones(4, ml_dtypes.float8_e4m3fn)}, path)
    with pytest.raises(ConfigError, match="w has dtype F8_E4M3; .* before it was quantised"):
        open_checkpoint(path)


def test_places_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    for source, message in [
        (tmp_path, r"several GGUF files \(a.gguf b.gguf\); name one"),
        (tmp_path / "a.gguf", "not a whole GGUF file"),
        (tmp_path / "notes.txt", "unknown kind of file; expected .safetensors .bin"),
        (tmp_path / "absent", "no such file or folder"),
    ]:
        with pytest.raises(ConfigError, match=message) as error:
            open_checkpoint(source)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="revision='main' is for names on the Hub"):
        open_checkpoint(tmp_path, revision="main")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match="no checkpoint in it; expected model.safetensors.index"):
        open_checkpoint(empty)


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns[-1]))
        if name == "nobody/nothing":
            raise OSError("404 Client Error.\nRepository Not Found")
        if allow_patterns[-1] == "pytorch_model*.bin":
            save_zipped(tmp_path / "pytorch_model.bin", {"w": ARRAYS["a"]})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert set(open_checkpoint("some/model", revision="v1").tensors) == {"w"}
    assert asked == [("some/model", "v1", w) for w in ("*.safetensors", "pytorch_model*.bin")]
    save_file(ARRAYS, tmp_path / "model.safetensors")
    assert set(open_checkpoint("some/model").tensors) == set(ARRAYS)
    assert len(asked) == 3  # where there are safetensors, no pickle is fetched
    with pytest.raises(ConfigError, match=r"nothing: no such folder, .* \(404 Client Error. Rep"):
        open_checkpoint("nobody/nothing")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(ARRAYS, tmp_path / "model.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ConfigError, match=r"needs the package safetensors, .*\[hub\]"):
        open_checkpoint(tmp_path)
