"""What a checkpoint says beside its weights comes back: special tokens, files, names of classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mpjax.errors import ConfigError
from mpjax.models import decoder, encoder
from mpjax.models.hf import Metadata, load_checkpoint, save_checkpoint
from mpjax.models.hf.architecture import ARCHITECTURES, architecture_name
from mpjax.models.hf.fields import Fields
from mpjax.models.transformer.encoder_config import encoder_config
from tests.models.hf import cases, ours
from tests.models.hf.test_load import case
from tests.models.shapes import drawn

pytestmark = pytest.mark.usefixtures("fast_compile")
TEXTS = json.loads((Path(__file__).parents[2] / "golden" / "hf_texts.json").read_text())
FILES = {
    "generation_config.json": b'{"eos_token_id": [2, 5], "temperature": 0.6}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b'{"chat_template": "x"}',
    "special_tokens_map.json": b"{}",
    "vocab.json": b"{}",
    "merges.txt": b"",
    "tokenizer.model": b"\xff\x00",
    "chat_template.jinja": "é".encode(),
    "modules.json": b"[]",
    "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
}


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", ["gpt2", "mistral", "bert"])
def test_tokens_and_files_go_out_as_they_came(name: str, tmp_path: Path) -> None:
    said = dict(bos_token_id=1, eos_token_id=[2, 5], pad_token_id=0, task_specific_params={"a": 1})
    folder = put(case(name, tmp_path / "theirs", **said, note=3), FILES | {"README.md": b"x"})
    model, params = load_checkpoint(folder, ignore=["note"])
    save_checkpoint(tmp_path / "ours", model, params)
    written = config_of(tmp_path / "ours")
    assert {k: written[k] for k in (*said, "note")} == said | {"note": 3}
    found = {p for p in (tmp_path / "ours").rglob("*") if p.is_file()}
    there = {p.relative_to(tmp_path / "ours").as_posix(): p.read_bytes() for p in found}
    assert {
        n: x for n, x in there.items() if n not in ("config.json", "model.safetensors")
    } == FILES
    assert model.metadata.ends == (2, 5), "generation_config.json comes first"
    # not of the programs: a model without it is the same one
    assert model == type(model)(model.config, model.precision)
    assert hash(model) == hash(type(model)(model.config, model.precision))


def test_what_a_config_leaves_out_is_what_transformers_assumes(tmp_path: Path) -> None:
    for name in ("gpt2", "llama", "qwen2"):
        model, params = load_checkpoint(case(name, tmp_path / name))
        save_checkpoint(tmp_path / f"{name}-ours", model, params)
        want = TEXTS["defaults"][name]
        written = config_of(tmp_path / f"{name}-ours")
        for field in ("bos_token_id", "eos_token_id"):
            assert written[field] == want[field]
        assert model.metadata.ends == (
            () if want["eos_token_id"] is None else (want["eos_token_id"],)
        )
    made = decoder("tiny", layers=1, width=16, heads=2)
    save_checkpoint(tmp_path / "made", made, drawn(made))
    assert config_of(tmp_path / "made")["eos_token_id"] is None, "no checkpoint named any"
    named = Metadata({"eos_token_id": 3}, {"tokenizer.json": "{}"})
    save_checkpoint(tmp_path / "named", made, drawn(made), metadata=named)
    assert config_of(tmp_path / "named")["eos_token_id"] == 3
    assert (tmp_path / "named" / "tokenizer.json").read_bytes() == b"{}"
    for files, message in (
        ({"../x": b""}, "names the file '../x'; give names inside"),
        ({"config.json": b""}, "names the file 'config.json'"),
    ):
        with pytest.raises(ConfigError, match=message):
            save_checkpoint(tmp_path / "bad", made, drawn(made), metadata=Metadata({}, files))
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("name", list(cases.CONFIGS))
def test_absent_fields_are_read_as_transformers_reads_them(name: str) -> None:
    """Of all fields at once, and of each alone."""
    kind, full = ARCHITECTURES[name], dict(TEXTS["defaults"][name])
    full["architectures"] = None

    def read(config: dict[str, Any]) -> Any:
        return kind.make(kind.config(**kind.read(Fields(config, "x")))).config

    want = read(full)
    assert read({}) == want
    for field in full:
        assert read({k: v for k, v in full.items() if k != field}) == want, field
    if name == "qwen3":
        assert want.per_head == 128 != want.width // 16
    if name == "mistral":
        assert (read({"sliding_window": None}).window, want.window) == (0, 4096)
        assert (read({"num_key_value_heads": None}).groups, want.groups) == (32, 8)


def test_a_mistral_without_a_window_stays_one(tmp_path: Path) -> None:
    model, params = load_checkpoint(case("mistral", tmp_path / "theirs", sliding_window=None))
    assert architecture_name(model.config) == "llama"
    save_checkpoint(tmp_path / "ours", model, params)
    written = config_of(tmp_path / "ours")
    assert (written["model_type"], written["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert written["sliding_window"] is None
    assert load_checkpoint(tmp_path / "ours")[0].config == model.config
    save_checkpoint(tmp_path / "other", decoder(model.config), params)
    assert config_of(tmp_path / "other")["model_type"] == "llama"


ENCODERS = TEXTS["encoders"]


def classifier(name: str, folder: Path, **config: Any) -> Path:
    tensors = {n: cases.weight(n, tuple(s)) for n, s in ENCODERS[name]["tensors"].items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(ENCODERS[name]["config"] | config))
    return folder


@pytest.mark.parametrize(
    ("name", "output"), [("bert, classes", "class"), ("bert, one number", "class"),
                         ("bert, tags", "token")],
)  # fmt: skip
def test_classifiers_have_the_logits_and_names_of_transformers(
    name: str, output: str, tmp_path: Path
) -> None:
    folder = classifier(name, tmp_path / "theirs")
    model, params = load_checkpoint(folder)
    given = {"ids": cases.ids("bert"), "types": cases.token_types(), "keep": cases.keep()}
    run = jax.jit(lambda p: model.apply(p, given)[0][output], compiler_options=ours.FAST)
    found, want = np.asarray(run(params)), np.asarray(ENCODERS[name]["logits"], np.float32)
    keep = cases.keep() if want.ndim == 3 else slice(None)
    assert found.shape == want.shape
    assert np.abs(found - want)[keep].max() <= ours.BAR * np.abs(want).max()
    assert not np.allclose(found, want[..., ::-1], atol=0.01) or want.shape[-1] == 1
    save_checkpoint(tmp_path / "ours", model, params)
    written, given_config = config_of(tmp_path / "ours"), ENCODERS[name]["config"]
    assert written["id2label"] == given_config["id2label"]
    assert written["label2id"] == {v: int(k) for k, v in given_config["id2label"].items()}
    if name == "bert, one number":
        assert (model.config.classes, written["problem_type"]) == (1, "regression")
    else:
        assert model.config.labels == ("neutral", "positive", "negative")
        assert "problem_type" not in written


def test_names_of_classes_follow_their_head(tmp_path: Path) -> None:
    names = {"10": "k", **{str(i): chr(97 + i) for i in range(10)}}  # as text, 10 is before 2
    model = encoder("bert-tiny", layers=1, width=16, heads=2, vocabulary=40, head="class",
                    labels=[names[str(i)] for i in range(11)])  # fmt: skip
    assert model.config.classes == 11
    save_checkpoint(tmp_path / "made", model, drawn(model))
    config = config_of(tmp_path / "made")
    assert config["id2label"] == names
    loaded = load_checkpoint(tmp_path / "made")[0]
    assert loaded.config.labels == tuple("abcdefghijk")
    renamed = load_checkpoint(tmp_path / "made", labels=tuple("kjihgfedcba"))[0]
    assert renamed.config.labels[0] == "k"
    key = jax.random.key(0)
    fresh = load_checkpoint(
        tmp_path / "made", classes=2, new=["encoder/class/**"], unused=["classifier.*"], key=key
    )[0]
    same = load_checkpoint(
        tmp_path / "made", new=["encoder/class/**"], unused=["classifier.*"], key=key
    )[0]
    assert (fresh.config.labels, same.config.labels) == ((), ()), "they are another head's"
    other = load_checkpoint(
        tmp_path / "made", head="token", classes=3, labels=("x", "y", "z"), key=key,
        new=["encoder/token/**"], unused=["classifier.*", "bert.pooler.*"],
    )[0]  # fmt: skip
    assert other.config.labels == ("x", "y", "z")
    path = tmp_path / "made" / "config.json"
    for wrong in ({"0": "a", "2": "b"}, {"a": "b"}, {"0": 3}):
        path.write_text(json.dumps(config | {"id2label": wrong}))
        with pytest.raises(ConfigError, match="id2label=.*; expected a name for each of 0 to"):
            load_checkpoint(tmp_path / "made")


def test_labels_are_checked() -> None:
    base = dict(head="class")
    for changes, message in [
        (dict(labels=("a", "b", "c"), classes=2), "3 labels .* for classes=2; give one for each"),
        (dict(labels=("a", "b"), head="masked"), "head='masked' has no classes that labels"),
        (dict(labels="ab"), "labels='ab'; give the name of each class"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            encoder_config("bert-tiny", **(base | changes))  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    named = encoder_config("bert-tiny", head="class", labels=("a", "b"))
    assert encoder_config(named, head="masked").labels == ()
    assert encoder_config(named, dropout=0.1).labels == ("a", "b")


def test_a_mean_is_pooled_as_sentence_transformers_stores_it(tmp_path: Path) -> None:
    model = encoder("bert-tiny", layers=1, width=16, heads=2, vocabulary=40, pool="mean")
    save_checkpoint(tmp_path / "mean", model, drawn(model))
    pooling = json.loads((tmp_path / "mean" / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] and pooling["word_embedding_dimension"] == 16
    modules = json.loads((tmp_path / "mean" / "modules.json").read_text())
    assert [m["path"] for m in modules] == ["", "1_Pooling"]
    again = load_checkpoint(tmp_path / "mean")[0]
    assert again.config.pool == "mean"
    classes = encoder("bert-tiny", layers=1, width=16, heads=2, pool="mean", head="class")
    with pytest.raises(ConfigError, match="pool='mean' of head='class'; BERT of transformers"):
        save_checkpoint(tmp_path / "no", classes, drawn(classes))


def test_a_broken_generation_config_is_one_line(tmp_path: Path) -> None:
    folder = put(case("llama", tmp_path), {"generation_config.json": b"{"})
    with pytest.raises(ConfigError, match="generation_config.json: not JSON"):
        load_checkpoint(folder)
