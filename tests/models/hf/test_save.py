"""Export: what was imported comes back bit for bit, whole or in shards, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mpjax.errors import ConfigError
from mpjax.models import decoder, decoder_config
from mpjax.models.hf import load_checkpoint, open_checkpoint, save_checkpoint
from mpjax.models.hf.architecture import ARCHITECTURES, architecture_name
from mpjax.models.hf.fields import Fields
from mpjax.models.transformer.encoder_config import encoder_config
from mpjax.models.transformer.seq2seq_config import seq2seq_config
from mpjax.precision import get_precision
from tests.models.hf import cases, ours
from tests.models.hf.test_load import bits, case
from tests.models.hf.test_logits import GOLDEN
from tests.models.shapes import drawn

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "bert"])  # all: hf_logits.py
def test_a_round_trip_keeps_every_bit(name: str, tmp_path: Path) -> None:
    source = ours.write(name, GOLDEN[name]["tensors"], tmp_path / "theirs")
    model, params = load_checkpoint(source)
    save_checkpoint(tmp_path / "ours", model, params)
    want, found = (load_file(f / "model.safetensors") for f in (source, tmp_path / "ours"))
    assert {n: x.tobytes() for n, x in found.items()} == {n: x.tobytes() for n, x in want.items()}
    again, same = load_checkpoint(tmp_path / "ours")
    assert (again.config, bits(same)) == (model.config, bits(params))
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    given = cases.CONFIGS[name]
    assert {key: written[key] for key in given} == given
    assert written["dtype"] == "float32"


@pytest.mark.parametrize("name", cases.CONFIGS)
def test_settings_come_back(name: str) -> None:
    kind = ARCHITECTURES[name]
    model = kind.make(kind.config(**kind.read(Fields(cases.CONFIGS[name], "config.json"))))
    assert architecture_name(model.config) == name and kind.write is not None
    written = kind.write(model.config)
    again = Fields(written | {"architectures": [kind.title(model.config)]}, "config.json")
    assert kind.make(kind.config(**kind.read(again))).config == model.config
    again.finish()


def test_shards_and_dtype(tmp_path: Path) -> None:
    model, params = load_checkpoint(case("gpt2", tmp_path / "theirs"))
    save_checkpoint(tmp_path / "ours", model, params, shard_bytes=3000, dtype="bf16")
    files = sorted(path.name for path in (tmp_path / "ours").iterdir())
    count = len(files) - 2
    assert count > 2 and files[1] == f"model-00001-of-{count:05}.safetensors"
    tensors = open_checkpoint(tmp_path / "ours").tensors
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    sizes = sum(x.nbytes // 2 for x in jax.tree.leaves(params))
    assert index["metadata"]["total_size"] == sizes
    _, again = load_checkpoint(tmp_path / "ours")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    assert bits(again) == bits(rounded) != bits(params)


def test_quantised_storage_is_written_as_it_is_seen(tmp_path: Path) -> None:
    precision = get_precision("fp32", rules=["**/mlp/up/kernel=p=e4m3"], update="stochastic")
    folder = case("llama", tmp_path / "theirs")
    model, params = load_checkpoint(folder, precision)
    save_checkpoint(tmp_path / "ours", model, params)
    up = params["decoder"]["layers"]["mlp"]["up"]["kernel"].dequantize()
    _, again = load_checkpoint(tmp_path / "ours")
    np.testing.assert_array_equal(again["decoder"]["layers"]["mlp"]["up"]["kernel"], up)


@pytest.mark.parametrize(
    "changes",
    [dict(logit_cap=1.0), dict(norm="layer"), dict(bias=True), dict(qk_norm=True, qkv_bias=True),
     dict(norm_first=False), dict(scale_embed=True), dict(tied=False, head_bias=True)],
    ids=str,
)  # fmt: skip
def test_a_shape_that_transformers_has_not_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="export: no architecture of transformers that we know"):
        architecture_name(decoder_config("tiny", **changes))
    assert architecture_name(decoder_config("tiny")) == "llama"
    for config in (
        seq2seq_config("seq2seq-tiny", norm_first=True),
        encoder_config("bert-tiny", types=0),
    ):
        with pytest.raises(
            ConfigError, match=f"has this {type(config).__name__}; expected the sha"
        ):
            architecture_name(config)


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = load_checkpoint(case("llama", tmp_path / "theirs"))
    with pytest.raises(ConfigError, match="theirs: export needs a new or empty folder"):
        save_checkpoint(tmp_path / "theirs", model, params)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="file: export needs a new or empty folder"):
        save_checkpoint(tmp_path / "file", model, params)
    with pytest.raises(ConfigError, match="file/new: cannot be written"):
        save_checkpoint(tmp_path / "file" / "new", model, params)
    with pytest.raises(ConfigError, match="unknown"):
        save_checkpoint(tmp_path / "new", model, params, dtype="bf17")

    import safetensors.numpy

    full = "No space left on device"
    for error in (OSError(28, full), safetensors.SafetensorError(full)):  # the package has its own

        def fail(*args: Any, error: Exception = error, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(safetensors.numpy, "save_file", fail)
        with pytest.raises(ConfigError, match=f"new: cannot be written .{full}"):
            save_checkpoint(tmp_path / "new", model, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "theirs"]


def test_others_can_read_what_is_written(tmp_path: Path) -> None:
    model, params = load_checkpoint(case("llama", tmp_path / "theirs"))
    save_checkpoint(tmp_path / "ours", model, params)
    modes = {path.stat().st_mode for path in (tmp_path / "ours").iterdir()}
    assert len(modes) == 1, "weights are as readable as their config"


def test_parameters_of_another_model_are_not_exported(tmp_path: Path) -> None:
    sizes = dict(width=16, heads=2, vocabulary=64)
    one, two = (decoder("tiny", layers=n, **sizes) for n in (1, 2))
    params = drawn(two)
    _, rest = params["decoder"], {k: v for k, v in params["decoder"].items() if k != "norm"}
    wrong = [
        (one, params, r"misshaped .*attention/key/kernel is \(2, 16, 16\), not \(1, 16, 16\)"),
        (decoder("tiny", layers=2, **sizes | {"width": 32}), params, "misshaped"),
        (two, params["decoder"], "missing decoder/embed/table.*unexpected embed/table"),
        (two, {"params": params}, "unexpected params/decoder.*state.params"),
        (two, {"decoder": rest}, "missing decoder/norm/scale;"),
    ]
    for model, given, message in wrong:
        with pytest.raises(ConfigError, match=message) as error:
            save_checkpoint(tmp_path / "new" / "folder", model, given)
        assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is begun"


def test_a_number_beyond_float16_is_not_exported_as_infinity(tmp_path: Path) -> None:
    model = decoder("tiny", layers=2, width=16, heads=2, vocabulary=64)
    params = jax.tree.map(lambda x: x, drawn(model))
    up = params["decoder"]["layers"]["mlp"]["up"]
    up["kernel"] = up["kernel"].at[1, 0, 0].set(70000.0)
    with pytest.raises(ConfigError, match=r"1.*beyond the largest float16; export in float32 or"):
        save_checkpoint(tmp_path / "low", model, params, dtype="f16")
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path / "high", model, params, dtype="bf16")
    again = load_checkpoint(tmp_path / "high")[1]["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert float(again[1, 0, 0]) == float(jnp.bfloat16(70000.0))
