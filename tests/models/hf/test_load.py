"""Import: what fits is loaded as stored, what does not is listed in one line before any read."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from mpjax.errors import ConfigError
from mpjax.formats import Quantized, quantize
from mpjax.models.hf import Checkpoint, load_checkpoint, open_checkpoint, save_checkpoint
from mpjax.models.hf.tensor_files import Tensor
from mpjax.precision import get_precision
from mpjax.train.sharding import parse_mesh, partition
from tests.models.hf import cases, ours
from tests.models.hf.test_logits import GOLDEN
from tests.models.hf.torch_writer import save_older, save_zipped

pytestmark = pytest.mark.usefixtures("fast_compile")


def case(name: str, folder: Path, edit: Callable[[dict[str, Any]], Any] | None = None,
         **config: Any) -> Path:  # fmt: skip
    """A checkpoint of a case, its tensors and config changed."""
    ours.write(name, GOLDEN[name]["tensors"], folder)
    if edit is not None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def bits(tree: Any) -> list[tuple[str, bytes]]:
    return [(str(x.dtype), np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def test_torch_files_and_shapes_without_a_prefix_load_the_same(tmp_path: Path) -> None:
    whole = case("gpt2", tmp_path / "whole")
    _, params = load_checkpoint(whole)
    tensors = load_file(whole / "model.safetensors")
    config = (whole / "config.json").read_text()
    base = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    base["h.0.attn.bias"] = np.tril(np.ones((1, 1, 4, 4), np.float32))  # a buffer, no weight
    base["lm_head.weight"] = base["wte.weight"]  # a copy, for the head is tied
    for name, save in (("zip", save_zipped), ("older", save_older)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(config)
        save(folder / "pytorch_model.bin", base)
        assert bits(load_checkpoint(folder)[1]) == bits(params)


def test_weights_are_stored_as_the_precision_says(tmp_path: Path) -> None:
    folder = case("llama", tmp_path)
    checkpoint = open_checkpoint(folder)
    _, whole = load_checkpoint(checkpoint)
    rules = ["**=p=bf16,c=bf16,o=f32", "**/norm*=fp32"]
    precision = get_precision("fp32", rules=rules[::-1], update="nearest")
    model, params = load_checkpoint(checkpoint, precision)
    drawn = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(lambda x: x.dtype, params) == jax.tree.map(lambda x: x.dtype, drawn)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32", "bfloat16"}
    cast = jax.tree.map(lambda x, p: x.astype(p.dtype), whole, params)
    assert bits(params) == bits(cast)  # rounded as JAX rounds


def test_fp8_storage_is_quantised_as_init_does(tmp_path: Path) -> None:
    precision = get_precision("fp32", rules=["**/mlp/up/kernel=p=e4m3"], update="stochastic")
    folder = case("llama", tmp_path)
    _, whole = load_checkpoint(folder)
    _, params = load_checkpoint(folder, precision)
    up = params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert isinstance(up, Quantized)
    kernel = whole["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert bits(up) == bits(quantize(kernel, "e4m3", "row", scale_rounding="up"))


def test_shards_hold_what_the_whole_holds(tmp_path: Path) -> None:
    mesh = parse_mesh("fsdp=2,tensor=4")
    folder = case("gpt2", tmp_path)
    _, whole = load_checkpoint(folder)

    def place(axes: Any, shape: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(axes, shape, mesh))

    _, params = load_checkpoint(folder, place=place)
    assert bits(params) == bits(whole)
    kernel = params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 8, 16)


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return edit


UP = "model.layers.1.mlp.up_proj.weight"
WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (drop("model.norm.weight", UP), f"tensors missing {UP}, model.norm.weight; take"),
    "unexpected": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.bias": np.zeros(24, np.float32)}),
        "tensors unexpected model.layers.0.mlp.up_proj.bias; take",
    ),
    "misshaped": (
        lambda t: t.update({UP: t[UP].T.copy()}),
        rf"misshaped {UP} is \(16, 24\), decoder/layers/mlp/up/kernel needs \(24, 16\); take",
    ),
    "a layer more": (
        lambda t: t.update({UP.replace("1", "2"): t[UP]}), "unexpected model.layers.2.mlp.up_proj",
    ),
    "integers": (lambda t: t.update({UP: t[UP].astype(np.int8)}), f"{UP} is int8, not floating"),
    "all at once": (
        lambda t: (drop("model.norm.weight")(t), t.update({"x": t[UP], UP: t[UP][:5].copy()})),
        r"missing model.norm.weight; unexpected x; misshaped .* \(5, 16\), decoder/",
    ),
    "an untied copy": (
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        "lm_head.weight differs from model.embed_tokens.weight, but the config ties them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_tensors_that_do_not_fit_are_listed(what: str, tmp_path: Path) -> None:
    edit, message = WRONG[what]
    with pytest.raises(ConfigError, match=message) as error:
        load_checkpoint(case("llama", tmp_path, edit))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("llama", dict(model_type="mamba"), "unknown architecture 'mamba'; known: bert gpt2"),
        ("llama", dict(model_type=None), "no model_type; pass architecture=, one of"),
        ("llama", dict(hidden_act="relu"), "hidden_act='relu' is not supported; known: silu"),
        ("gpt2", dict(activation_function="selu"), "activation_function='selu' is not supported"),
        ("llama", dict(attention_bias=True), "attention_bias=True is not supported; expected Fal"),
        ("llama", dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "rope_type='yarn'"),
        ("llama", dict(rope_parameters={"rope_type": "linear"}), "rope_parameters: no factor"),
        (
            "llama",
            dict(rope_parameters={"rope_type": "default", "beta_fast": 32}),
            r"rope_parameters: unknown field beta_fast, which may .* pass ignore=\['beta_fast'\]",
        ),
        ("llama", dict(rope_scaling={"type": "dynamic", "factor": 2.0}, rope_parameters=None),
         "type='dynamic' is not supported"),
        ("llama", dict(quantization_config={}), "unknown field quantization_config, which may"),
        ("llama", dict(hidden_size="16"), "hidden_size='16'; expected int"),
        ("llama", dict(hidden_size=True), "hidden_size=True; expected int"),
        ("llama", dict(hidden_size=None), "no hidden_size, which this architecture needs"),
        ("llama", dict(num_attention_heads=3), "width=16 is not a multiple of heads=3"),
        ("qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
         "sliding_window=4 in 1 of 2 layers; expected all or none"),
        ("bert", dict(architectures=["BertForQuestionAnswering"]), "names 'BertForQuestionAns"),
        ("bert", dict(position_embedding_type="relative_key"), "type='relative_key' is not"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "by_inverse_layer_idx=True is not"),
    ],
)  # fmt: skip
def test_settings_that_are_not_ours_are_refused(
    name: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_checkpoint(case(name, tmp_path, **config))
    assert "\n" not in str(error.value)


def test_fields_without_effect_can_be_ignored(tmp_path: Path) -> None:
    folder = case("llama", tmp_path, my_note="x", rope_parameters=None, rope_theta=50.0,
                  rope_scaling={"type": "linear", "factor": 2.0})  # fmt: skip
    with pytest.raises(ConfigError, match="unknown field my_note"):
        load_checkpoint(folder)
    model, _ = load_checkpoint(folder, ignore=["my_note"], remat="full")
    c = model.config
    assert (c.rope_theta, c.rope_scaling, c.rope_factor) == (50.0, "linear", 2.0)  # transformers 4
    assert c.remat == "full"


def test_both_spellings_of_rope_are_read_if_they_agree(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    both = dict(rope_theta=50.0, rope_scaling=rope, rope_parameters=rope | {"rope_theta": 50.0})
    c = load_checkpoint(case("llama", tmp_path / "a", **both))[0].config
    assert (c.rope_theta, c.rope_scaling, c.rope_factor) == (50.0, "linear", 2.0)
    both["rope_theta"] = 60.0
    with pytest.raises(ConfigError, match="rope_scaling and rope_parameters that differ"):
        load_checkpoint(case("llama", tmp_path / "b", **both))


def test_norms_of_the_first_bert_are_read(tmp_path: Path) -> None:
    def older(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if "LayerNorm" in n]:
            old = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
            tensors[old] = tensors.pop(name)

    _, params = load_checkpoint(case("bert", tmp_path / "new"))
    _, same = load_checkpoint(case("bert", tmp_path / "old", older))
    assert bits(same) == bits(params)


def test_an_untied_bert_has_the_bias_that_runs(tmp_path: Path) -> None:
    def untied(tensors: dict[str, Any]) -> None:
        tensors["cls.predictions.decoder.weight"] = np.asarray(
            tensors["bert.embeddings.word_embeddings.weight"] + 1
        )
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"] + 1

    folder = case("bert", tmp_path / "theirs", untied, tie_word_embeddings=False)
    model, params = load_checkpoint(folder)
    head = params["encoder"]["masked"]["head"]
    tensors = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(head["bias"], tensors["cls.predictions.decoder.bias"])
    save_checkpoint(tmp_path / "ours", model, params)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    for name in ("bias", "decoder.bias"):  # transformers 4 and 5
        np.testing.assert_array_equal(written[f"cls.predictions.{name}"], head["bias"])
    assert bits(load_checkpoint(tmp_path / "ours")[1]) == bits(params)


def test_a_classifier_on_a_checkpoint_without_one(tmp_path: Path) -> None:
    folder = case("bert", tmp_path, architectures=None)
    with pytest.raises(ConfigError, match="missing classifier.bias, classifier.weight; unexp"):
        load_checkpoint(folder, head="class", classes=3)
    key = jax.random.key(0)
    model, params = load_checkpoint(
        folder, head="class", classes=3, new=["encoder/class/*"], key=key, unused=["cls.*"]
    )
    kernel = np.asarray(params["encoder"]["class"]["head"]["kernel"])
    assert kernel.shape == (16, 3) and 0.1 < kernel.std() < 0.5
    assert (model.config.head, model.config.classes, model.config.dropout) == ("class", 3, 0.1)
    pooler = cases.weight("bert.pooler.dense.weight", (16, 16)).T
    np.testing.assert_array_equal(params["encoder"]["pooler"]["dense"]["kernel"], pooler)


def test_weights_can_be_new_or_left_out(tmp_path: Path) -> None:
    folder = case("llama", tmp_path, drop("model.norm.weight"))
    _, whole = load_checkpoint(case("llama", tmp_path / "whole"))
    key = jax.random.key(3)
    _, params = load_checkpoint(folder, new=["decoder/norm/*"], key=key)
    assert bits(params["decoder"]["norm"]) == bits({"scale": np.ones(16, np.float32)})
    assert bits(params["decoder"]["layers"]) == bits(whole["decoder"]["layers"])
    case("llama", tmp_path, lambda t: t.update({"score.weight": np.ones((2, 16), np.float32)}))
    with pytest.raises(ConfigError, match="unexpected model.norm.weight, score.weight; take"):
        load_checkpoint(tmp_path, new=["decoder/norm/*"], key=key)
    for options, message in [
        (dict(new=["decoder/norm/*"], unused=["score.*"]), "is drawn at random; pass key="),
        (dict(new=["decoder/nrm/*"], key=key), r"new='decoder/nrm/\*' matches none of the paths"),
        (dict(unused=["scores.*"]), r"unused='scores.\*' matches none of the tensors of the"),
        (dict(unused="score.*"), r"unused='score.\*' is text; pass a list"),
        (dict(architecture="gpt2"), "model_type='llama', but architecture='gpt2' was asked for"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_checkpoint(tmp_path, **options)  # type: ignore[arg-type]


def test_a_number_too_large_for_its_storage_is_refused(tmp_path: Path) -> None:
    folder = case("llama", tmp_path, lambda t: t[UP].__setitem__((3, 4), 7e4))
    with pytest.raises(ConfigError, match=f"decoder/layers/mlp/up/kernel: {UP} has numbers beyond"):
        load_checkpoint(
            folder, get_precision("fp32", rules=["**=p=f16,c=f32,o=f32"], update="nearest")
        )
    load_checkpoint(
        folder, get_precision("fp32", rules=["**=p=bf16,c=f32,o=f32"], update="nearest")
    )


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(case("llama", tmp_path))
    alive: list[Any] = []

    def counted(tensor: Tensor) -> Tensor:
        def read() -> np.ndarray:
            assert not any(ref() is not None for ref in alive)
            x = tensor.read()
            alive.append(weakref.ref(x))
            return x

        return Tensor(tensor.shape, tensor.dtype, read)

    lazy = {name: counted(tensor) for name, tensor in checkpoint.tensors.items()}
    load_checkpoint(Checkpoint(checkpoint.where, checkpoint.config, lazy))
    assert len(alive) == len(lazy)  # each was read once


def test_an_encoder_decoder_without_a_config(tmp_path: Path) -> None:
    names = {f"encoder.layers.{i}.{n}" for i in range(2) for n in _LAYER}
    names |= {n.replace("encoder.", "decoder.", 1) for n in names}
    names |= {f"decoder.layers.{i}.{n}" for i in range(2) for n in _CROSS}
    wide = {"fc_1.weight": (24, 16), "fc_2.weight": (16, 24), "fc_1.bias": (24,)}
    tensors = {}
    for name in names:
        end = ".".join(name.split(".")[-2:])
        shape = wide.get(end, (16, 16) if "fc_" in name and end.endswith("weight") else (16,))
        tensors[name] = cases.weight(name, shape)
    for half, rows in (("encoder", 7), ("decoder", 9)):
        tensors[f"{half}.tok_embedding.weight"] = cases.weight(f"{half}.tok", (rows, 16))
        tensors[f"{half}.pos_embedding.weight"] = cases.weight(f"{half}.pos", (12, 16))
    tensors["decoder.fc_out.weight"] = cases.weight("out", (9, 16))
    tensors["decoder.fc_out.bias"] = cases.weight("bias", (9,))
    save_zipped(tmp_path / "best.pt", tensors)
    shape = dict(layers=2, width=16, heads=4, mlp_width=24, vocabulary=9, source_vocabulary=7)
    model, params = load_checkpoint(
        tmp_path / "best.pt", architecture="pytorch-seq2seq", context=12, **shape
    )
    c = model.config
    assert (c.activation, c.scale_embed, c.norm_first, c.head_bias) == ("relu", True, False, True)
    across = params["decoder"]["layers"]["cross_attention"]["value"]["kernel"]
    want = tensors["decoder.layers.1.encoder_attention.fc_v.weight"].T
    np.testing.assert_array_equal(across[1], want)
    np.testing.assert_array_equal(
        params["decoder"]["head"]["kernel"], cases.weight("out", (9, 16)).T
    )
    with pytest.raises(ConfigError, match="misshaped encoder.tok_embedding.weight is .7, 16., enc"):
        load_checkpoint(
            tmp_path / "best.pt", architecture="pytorch-seq2seq", context=12,
            **shape | dict(source_vocabulary=8),
        )  # fmt: skip


_SELF = [f"self_attention.fc_{n}.{end}" for n in "qkvo" for end in ("weight", "bias")]
_CROSS = [n.replace("self", "encoder") for n in _SELF]
_CROSS += [f"enc_attn_layer_norm.{end}" for end in ("weight", "bias")]
_LAYER = _SELF + [
    f"{n}.{end}"
    for n in ("self_attn_layer_norm", "ff_layer_norm", "positionwise_feedforward.fc_1",
              "positionwise_feedforward.fc_2")
    for end in ("weight", "bias")
]  # fmt: skip
