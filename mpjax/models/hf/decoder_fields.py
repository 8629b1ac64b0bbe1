"""config.json of GPT-2 and of Llama and its kin, to and from a DecoderConfig."""

from __future__ import annotations

from mpjax.errors import ConfigError
from mpjax.models.hf.fields import Fields
from mpjax.models.transformer.decoder_config import DecoderConfig
from mpjax.typing import Settings

# Activation in transformers -> in mpjax, and the inverse.
GELU = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact", "relu": "relu"}
GELU_BACK = {"gelu": "gelu_new", "gelu_exact": "gelu", "relu": "relu"}


# Field of DecoderConfig -> field of config.json.
_GPT2_SIZES = dict(
    vocabulary="vocab_size", context="n_positions", width="n_embd", layers="n_layer",
    heads="n_head",
)  # fmt: skip
_LLAMA_SIZES = dict(
    vocabulary="vocab_size", context="max_position_embeddings", width="hidden_size",
    layers="num_hidden_layers", heads="num_attention_heads",
)  # fmt: skip
# Defaults of transformers for fields that a config.json leaves out; null is handled apart.
_GPT2 = dict(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
_LLAMA = dict(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, max_position_embeddings=2048,
)  # fmt: skip
_MISTRAL = _LLAMA | dict(
    intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072
)
_QWEN = _LLAMA | dict(
    vocab_size=151936, intermediate_size=22016, num_key_value_heads=32,
    max_position_embeddings=32768,
)  # fmt: skip
_WINDOW, _FIRST_WINDOW = 4096, 28  # sliding_window, and Qwen's max_window_layers
_QWEN3_HEAD = 128


def read_gpt2(fields: Fields) -> Settings:
    """Returns the fields of a DecoderConfig for GPT-2."""
    f = fields
    f.only("scale_attn_weights", True)
    f.only("scale_attn_by_inverse_layer_idx", False)
    f.only("add_cross_attention", False)
    f.only("is_encoder_decoder", False)
    return dict(
        norm="layer",
        position="learned",
        bias=True,
        **{our: f.take(name, int, absent=_GPT2[name]) for our, name in _GPT2_SIZES.items()},
        mlp_width=f.take("n_inner", int, 0),
        activation=f.one_of("activation_function", GELU, "gelu_new"),
        epsilon=f.take("layer_norm_epsilon", float, 1e-5),
        dropout=f.take("resid_pdrop", float, 0.1),
        tied=f.take("tie_word_embeddings", bool, True),
    )


def write_gpt2(c: DecoderConfig) -> Settings:
    """Returns the fields of a config.json."""
    return dict(
        **{name: getattr(c, our) for our, name in _GPT2_SIZES.items()},
        n_inner=c.mlp_width or None,
        activation_function=GELU_BACK[c.activation],
        layer_norm_epsilon=c.epsilon,
        resid_pdrop=c.dropout,
        embd_pdrop=c.dropout,
        attn_pdrop=0.0,
        tie_word_embeddings=c.tied,
        bos_token_id=None,  # the default of transformers is an id of GPT-2's vocabulary
        eos_token_id=None,
    )


def read_llama(fields: Fields) -> Settings:
    """Returns the fields of a DecoderConfig for Llama."""
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields.only("rope_interleaved", False)
    return _kin(fields, _LLAMA)


def read_mistral(fields: Fields) -> Settings:
    """Returns the fields of a DecoderConfig for Mistral, with its sliding window."""
    found = _kin(fields, _MISTRAL)
    return found | dict(window=fields.take("sliding_window", int, 0, absent=_WINDOW))


def read_qwen2(fields: Fields) -> Settings:
    """Returns the fields of a DecoderConfig for Qwen2: biases of queries, keys and values."""
    found = _kin(fields, _QWEN)
    return found | dict(qkv_bias=True, window=_window(fields, found["layers"]))


def read_qwen3(fields: Fields) -> Settings:
    """Returns the fields of a DecoderConfig for Qwen3: queries and keys are normalised."""
    fields.only("attention_bias", False)
    found = _kin(fields, _QWEN, _QWEN3_HEAD)
    return found | dict(qk_norm=True, window=_window(fields, found["layers"]))


def _kin(f: Fields, absent: dict[str, int], head_width: int = 0) -> Settings:
    """Returns the fields that Llama, Mistral and Qwen share.

    Args:
      f: of the config.json.
      absent: defaults of sizes that it leaves out.
      head_width: default of `head_dim`; 0 is the width over the heads.
    """

    f.one_of("hidden_act", {"silu": "swiglu"}, "silu")
    f.only("is_encoder_decoder", False)
    sizes = {our: f.take(name, int, absent=absent[name]) for our, name in _LLAMA_SIZES.items()}
    heads = sizes["heads"]
    per_head = f.take("head_dim", int, head_width)
    groups = absent.get("num_key_value_heads", heads)
    return dict(
        norm="rms",
        position="rotary",
        activation="swiglu",
        bias=False,
        **sizes,
        kv_heads=f.take("num_key_value_heads", int, heads, absent=groups),
        head_width=0 if per_head * heads == sizes["width"] else per_head,
        mlp_width=f.take("intermediate_size", int, absent=absent["intermediate_size"]),
        epsilon=f.take("rms_norm_eps", float, 1e-6),
        tied=f.take("tie_word_embeddings", bool, False),
        **_read_rope(f),
    )


def _read_rope(f: Fields) -> Settings:
    """transformers 5 has rope_parameters; version 4 has rope_theta and rope_scaling."""
    old, new = f.inner("rope_scaling"), f.inner("rope_parameters")
    theta = f.take("rope_theta", float, 10000.0)
    found = [_scaled(inner, theta) for inner in (old, new) if inner is not None]
    if any(one != found[0] for one in found):
        f.refuse("rope_scaling and rope_parameters that differ; keep the one that holds")
    return found[0] if found else dict(rope_theta=theta)


def _scaled(scaling: Fields, theta: float) -> Settings:
    theta = scaling.take("rope_theta", float, theta)
    known = {"default": "none", "linear": "linear", "llama3": "llama3"}
    older = scaling.one_of("type", known, "default")
    kind = scaling.one_of("rope_type", known, "default")
    kind = older if kind == "none" else kind
    found: Settings = dict(rope_theta=theta, rope_scaling=kind)
    if kind != "none":
        found["rope_factor"] = scaling.take("factor", float)
    if kind == "llama3":
        found["rope_low"] = scaling.take("low_freq_factor", float)
        found["rope_high"] = scaling.take("high_freq_factor", float)
        found["rope_context"] = scaling.take("original_max_position_embeddings", int)
    scaling.finish()
    return found


def _window(f: Fields, layers: int) -> int:
    """Qwen's sliding window: in the layers from max_window_layers on, or those of layer_types."""
    used = f.take("use_sliding_window", bool, False)
    size = f.take("sliding_window", int, 0, absent=_WINDOW)
    first = f.take("max_window_layers", int, layers, absent=_FIRST_WINDOW)
    sliding = layers - min(first, layers)
    kinds = f.take("layer_types", list, [])
    if kinds:
        sliding = sum(kind == "sliding_attention" for kind in kinds)
    if not used or not size or not sliding:
        return 0
    if sliding != layers:
        f.refuse(
            f"sliding_window={size} in {sliding} of {layers} layers; expected all or none, for a"
            " model of ours has one window"
        )
    return size


def write_llama(c: DecoderConfig) -> Settings:
    """Returns the fields of a config.json of Llama; Mistral, Qwen2 and Qwen3 add theirs."""
    rope: Settings = {"rope_theta": c.rope_theta, "rope_type": "default"}
    if c.rope_scaling != "none":
        rope |= {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling == "llama3":
        rope |= dict(
            low_freq_factor=c.rope_low,
            high_freq_factor=c.rope_high,
            original_max_position_embeddings=c.rope_context,
        )
    scaled = {} if c.rope_scaling == "none" else {"rope_scaling": rope}
    return scaled | dict(
        **{name: getattr(c, our) for our, name in _LLAMA_SIZES.items()},
        num_key_value_heads=c.groups,
        head_dim=c.per_head,
        intermediate_size=c.hidden,
        hidden_act="silu",
        rms_norm_eps=c.epsilon,
        tie_word_embeddings=c.tied,
        rope_parameters=rope,
        rope_theta=c.rope_theta,  # transformers 4 reads this and rope_scaling
        bos_token_id=None,  # the default of transformers is an id of Llama's vocabulary
        eos_token_id=None,
    )


def write_mistral(c: DecoderConfig) -> Settings:
    """Returns the fields of a config.json."""
    return write_llama(c) | dict(sliding_window=c.window or None)


def write_qwen2(c: DecoderConfig) -> Settings:
    """Returns the fields of a config.json, which has no head_dim where heads share the width."""
    return {k: v for k, v in write_qwen3(c).items() if k != "head_dim" or c.head_width}


def write_qwen3(c: DecoderConfig) -> Settings:
    """Returns the fields of a config.json."""
    kind = "sliding_attention" if c.window else "full_attention"
    return write_llama(c) | dict(
        use_sliding_window=bool(c.window),
        sliding_window=c.window or None,
        layer_types=[kind] * c.layers,
        **({"max_window_layers": 0} if c.window else {}),
    )


def read_seq2seq(fields: Fields) -> Settings:
    """Returns the choices of bentrevett's pytorch-seq2seq, whose files have no settings at all."""
    del fields  # the user gives the sizes; the tensors do not show the number of heads
    return dict(
        norm="layer",
        norm_first=False,
        position="learned",
        activation="relu",
        bias=True,
        scale_embed=True,
        tied=False,
        head_bias=True,
    )


def decoder_architecture(c: DecoderConfig) -> str:
    """Returns the model_type that has the shape of a decoder.

    Raises:
      ConfigError: none has.
    """
    has = {"logit_cap": c.logit_cap, "scale_embed": c.scale_embed, "head_bias": c.head_bias,
           "norm_embed": c.norm_embed, "norm_first=False": not c.norm_first}  # fmt: skip
    if odd := " ".join(name for name, there in has.items() if there):
        raise ConfigError(f"export: no architecture of transformers that we know has {odd}")
    shape = (c.norm, c.position, c.activation == "swiglu", c.bias)
    if shape == ("layer", "learned", False, True) and c.groups == c.heads and not (
        c.qk_norm or c.window or c.head_width
    ):  # fmt: skip
        return "gpt2"
    if shape == ("rms", "rotary", True, False) and not (c.qkv_bias and c.qk_norm):
        return (
            "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "mistral" if c.window else "llama"
        )
    raise ConfigError(
        f"export: no architecture of transformers that we know has norm={c.norm!r} position="
        f"{c.position!r} activation={c.activation!r} bias={c.bias} qkv_bias={c.qkv_bias} qk_norm="
        f"{c.qk_norm}; change the config to that of gpt2, llama, mistral, qwen2 or qwen3"
    )
