"""GGUF files: the model of the safetensors that they were made of, rotary pairs turned back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import tokenizers

from mpjax.errors import ConfigError
from mpjax.models.hf import load_checkpoint, open_checkpoint, save_checkpoint
from mpjax.models.hf.gguf_file import _INNER, _OUTER
from tests.bounds import bounded
from tests.models.hf import cases

SHAPES: dict[str, tuple[int, ...]] = json.loads(
    (Path(__file__).parents[2] / "golden" / "hf_logits.json").read_text()
)["cases"]["llama"]["tensors"]
CONFIG = cases.CONFIGS["llama"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e2}}


def paired(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in the order 0 K/2 1 K/2+1 .., as llama.cpp's converter writes them."""
    K = x.shape[0] // heads
    order = [h * K + j + half for h in range(heads) for j in range(K // 2) for half in (0, K // 2)]
    return x[order]


def write(path: Path, kind: str = "llama", **changes: Any) -> Path:
    """The case `llama` as llama.cpp has it."""
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(100.0)
    writer.add_rope_dimension_count(4)
    for name, add in changes.items():
        getattr(writer, name)(*add)
    back = {theirs: ours for ours, theirs in _INNER.items()} | {v: k for k, v in _OUTER.items()}
    for name, shape in SHAPES.items():
        x = cases.weight(name, tuple(shape))
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else 0
        if heads and kind == "llama":
            x = paired(x, heads)
        if name in back:
            writer.add_tensor(back[name], x)
        else:
            _, _, layer, *inner, _ = name.split(".")
            writer.add_tensor(f"blk.{layer}.{back['.'.join(inner)]}.weight", x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def trees(a: Any, b: Any) -> list[bool]:
    return jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


def test_the_same_as_its_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {n: cases.weight(n, tuple(shape)) for n, shape in SHAPES.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model, params = load_checkpoint(tmp_path)
    other, found = load_checkpoint(write(tmp_path / "a.gguf"))
    assert abs(other.config.epsilon - model.config.epsilon) < 1e-12  # GGUF keeps float32
    assert model.config.rope_theta == other.config.rope_theta == 100.0
    assert all(trees(found, params))
    raw, _ = open_checkpoint(write(tmp_path / "b.gguf")).tensors, None
    assert raw["model.layers.0.self_attn.q_proj.weight"].dtype == np.float32
    plain = paired(tensors["model.layers.0.self_attn.q_proj.weight"], 4)
    turned = raw["model.layers.0.self_attn.q_proj.weight"].read()
    assert not np.array_equal(plain, turned)  # the file has another order


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_0"])
def test_dequantises(kind: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    blocks = x.reshape(4, 2, 32)
    lowest, highest = blocks.min(-1, keepdims=True), blocks.max(-1, keepdims=True)
    if kind == "Q8_0":
        step, zero = np.abs(blocks).max(-1, keepdims=True) / 127, 0.0
        codes = np.round(blocks / step).clip(-127, 127)
    elif kind == "Q4_1":
        step, zero = (highest - lowest) / 15, lowest
        codes = np.round((blocks - zero) / step).clip(0, 15)
    else:
        step, zero = np.abs(blocks).max(-1, keepdims=True) / 7, 0.0
        codes = np.round(blocks / step).clip(-8, 7)
    half = lambda v: np.asarray(v, np.float32).astype(np.float16)  # noqa: E731
    want = (codes * half(step).astype(np.float32) + half(zero).astype(np.float32)).reshape(4, 64)
    parts = [half(step).view(np.uint8).reshape(4, 2, 2)]
    if kind == "Q4_1":
        parts.append(half(zero).view(np.uint8).reshape(4, 2, 2))
    if kind == "Q8_0":
        parts.append(codes.astype(np.int8).view(np.uint8))
    else:
        nibbles = (codes + (8 if kind == "Q4_0" else 0)).astype(np.uint8)
        parts.append(nibbles[..., :16] | nibbles[..., 16:] << 4)
    data = np.concatenate(parts, -1).reshape(4, -1)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2")
    writer.add_head_count(2)
    writer.add_embedding_length(64)
    writer.add_tensor("token_embd.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = open_checkpoint(tmp_path / "a.gguf").tensors["model.embed_tokens.weight"]
    assert tensor.shape == (4, 64)
    np.testing.assert_allclose(tensor.read(), want, rtol=0, atol=1e-6)
    assert 1e-4 < np.abs(want - x).max() < 0.5


def test_what_may_change_the_result_is_refused(tmp_path: Path) -> None:
    for changes, message in [
        (dict(add_rope_dimension_count=(2,)), "llama.rope.dimension_count=2 is not the head width"),
        (dict(add_expert_count=(4,)), "unknown setting llama.expert_count, which may change"),
        (dict(add_tensor=("rope_freqs.weight", np.ones(2, np.float32))), "unknown tensor rope_fre"),
        (dict(add_rope_scaling_type=(gguf.RopeScalingType.YARN,)), "rope_type='yarn' is not supp"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_checkpoint(write(tmp_path / "a.gguf", **changes))
    with pytest.raises(ConfigError, match="architecture 'phi3'; expected llama qwen2 qwen3"):
        open_checkpoint(write(tmp_path / "a.gguf", "phi3"))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.98])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ConfigError, match="not a whole GGUF file"):
        open_checkpoint(path)


def test_many_control_tokens_are_added_at_once(tmp_path: Path) -> None:
    tokens = [*(f"<{i:x}>" for i in range(30_000)), "a", "b", "ab"]
    path = write(
        tmp_path / "a.gguf", add_tokenizer_model=("gpt2",), add_tokenizer_pre=("smollm",),
        add_token_list=(tokens,), add_token_types=([3] * 30_000 + [1] * 3,),
        add_token_merges=(["a b"],),
    )  # fmt: skip
    with bounded(path):
        text = open_checkpoint(path).tokenizer_json() or ""
    assert len(json.loads(text)["added_tokens"]) == 30_000


def test_its_tokenizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *alphabet, "ab", "abc", "12"]
    add = dict(
        add_tokenizer_model=("gpt2",), add_tokenizer_pre=("smollm",), add_token_list=(tokens,),
        add_token_types=([3] + [1] * (len(tokens) - 1),),
        add_token_merges=(["a b", "ab c", "1 2"],),
    )  # fmt: skip
    text = open_checkpoint(write(tmp_path / "a.gguf", **add)).tokenizer_json()
    tokenizer = tokenizers.Tokenizer.from_str(text or "")
    encoded = tokenizer.encode("abc12<|endoftext|>é")
    assert encoded.tokens == ["abc", "1", "2", "<|endoftext|>", "Ã", "©"]  # digits stand alone
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "abc12<|endoftext|>é"
    with pytest.raises(ConfigError, match="tokenizer 'gpt2' with pieces 'tekken'; expected"):
        other = add | dict(add_tokenizer_pre=("tekken",))
        open_checkpoint(write(tmp_path / "b.gguf", **other)).tokenizer_json()
    said = dict(add_bos_token_id=(0,), add_eos_token_id=(3,), add_add_bos_token=(True,),
                add_chat_template=("{{ bos_token }}",))  # fmt: skip
    model, params = load_checkpoint(write(tmp_path / "c.gguf", **add, **said))
    assert model.metadata.ends == (3,)
    assert load_checkpoint(write(tmp_path / "d.gguf", **add))[0].metadata.ends == ()
    save_checkpoint(tmp_path / "out", model, params)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (0, 3)
    page = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (page["bos_token"], page["chat_template"]) == (tokens[0], "{{ bos_token }}")
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert made.encode("abc").tokens == [tokens[0], "abc"]
    load_checkpoint(write(tmp_path / "e.gguf", **other))
    assert "an export will have no tokenizer" in caplog.text
