"""The supported architectures: tensor names, settings, and the model that each maps to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mpjax.errors import ConfigError, brief
from mpjax.models.hf import decoder_fields as fields
from mpjax.models.hf.checkpoint import Checkpoint
from mpjax.models.hf.encoder_fields import bert_class, is_bert, read_bert, write_bert
from mpjax.models.hf.fields import Fields
from mpjax.models.hf.tensor_names import BERT, GPT2, LLAMA, SEQ2SEQ, Table
from mpjax.models.transformer.block_config import BlockConfig
from mpjax.models.transformer.decoder import Decoder, decoder
from mpjax.models.transformer.decoder_config import DecoderConfig
from mpjax.models.transformer.encoder import Encoder, encoder
from mpjax.models.transformer.encoder_config import EncoderConfig
from mpjax.models.transformer.seq2seq import Seq2Seq, seq2seq
from mpjax.models.transformer.seq2seq_config import Seq2SeqConfig
from mpjax.typing import Settings

Transformer = Decoder | Encoder | Seq2Seq


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How a `model_type` of transformers maps to a model of ours.

    Args:
      prefix: of the names of its base model, which a checkpoint of that alone leaves out.
      table: our leaves and their tensors.
      read: config.json -> fields of our config.
      config: the config that has these fields.
      make: a config, a Precision and changes to the config -> the model.
      copies: tensors that repeat another one where the head is tied.
      buffers: endings of names that hold no weight.
      renamed: older endings of names, and what they are now.
      title: our config -> the class of transformers that an export names.
      write: our config -> config.json; None where transformers has no such class.
    """

    prefix: str
    table: Table
    read: Callable[[Fields], Settings]
    config: type[BlockConfig]
    make: Callable[..., Transformer]
    copies: dict[str, str] = dataclasses.field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    title: Callable[[Any], str] = lambda _: ""
    write: Callable[[Any], Settings] | None = None


def _llama(
    title: str,
    read: Callable[[Fields], Settings],
    write: Callable[[DecoderConfig], Settings],
) -> Architecture:
    return Architecture(
        "model.", LLAMA, read, DecoderConfig, decoder,
        {"lm_head.weight": "model.embed_tokens.weight"}, ("rotary_emb.inv_freq",), {},
        lambda _: title, write,
    )  # fmt: skip


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        "bert.", BERT, read_bert, EncoderConfig, encoder,
        {
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
        ("embeddings.position_ids",),
        {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
        bert_class, write_bert,
    ),
    "gpt2": Architecture(
        "transformer.", GPT2, fields.read_gpt2, DecoderConfig, decoder,
        {"lm_head.weight": "transformer.wte.weight"},
        (".attn.bias", ".attn.masked_bias"), {},  # the causal mask
        lambda _: "GPT2LMHeadModel", fields.write_gpt2,
    ),
    "llama": _llama("LlamaForCausalLM", fields.read_llama, fields.write_llama),
    "mistral": _llama("MistralForCausalLM", fields.read_mistral, fields.write_mistral),
    "qwen2": _llama("Qwen2ForCausalLM", fields.read_qwen2, fields.write_qwen2),
    "qwen3": _llama("Qwen3ForCausalLM", fields.read_qwen3, fields.write_qwen3),
    "pytorch-seq2seq": Architecture("", SEQ2SEQ, fields.read_seq2seq, Seq2SeqConfig, seq2seq),
}  # fmt: skip


def architecture_of(checkpoint: Checkpoint, named: str | None) -> Architecture:
    """Returns the architecture that a checkpoint says it is, or that the user says.

    Raises:
      ConfigError: an unknown one, none, or two.
    """
    said = checkpoint.config.get("model_type")
    if named is not None and said is not None and named != said:
        raise ConfigError(
            f"{checkpoint.config_file}: model_type={brief(said)}, but architecture={named!r} was"
            " asked for; leave that out"
        )
    kind = named or said
    if kind is None:
        raise ConfigError(
            f"{checkpoint.config_file}: no model_type; pass architecture=, one of"
            f" {' '.join(ARCHITECTURES)}"
        )
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ConfigError(
            f"{checkpoint.config_file}: unknown architecture {brief(kind)}; known:"
            f" {' '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[kind]


def architecture_name(config: object, loaded: str = "") -> str:
    """Returns the model_type that has the shape of a config of ours.

    Args:
      config: of a model.
      loaded: the model_type that it was loaded from, which it keeps where it still has that shape:
        a Mistral without a window has Llama's too.

    Raises:
      ConfigError: none has.
    """
    if type(config) is DecoderConfig:  # excludes Seq2SeqConfig, a subclass
        found = fields.decoder_architecture(config)
        return loaded if _has_shape(config, loaded, found) else found
    if isinstance(config, EncoderConfig):
        if is_bert(config):
            return "bert"
        if config.task_heads:
            raise ConfigError(
                f"export: task_heads={config.task_heads}; BERT of transformers has one head; export"
                " a model with task_heads=() and one head"
            )
        if config.pool != "first":
            raise ConfigError(
                f"export: pool={config.pool!r} of head={config.head!r}; BERT of transformers pools"
                " the first token alone"
            )
    raise ConfigError(
        f"export: no architecture of transformers that we know has this {type(config).__name__};"
        f" expected the shape of one of {' '.join(ARCHITECTURES)}"
    )


def _has_shape(config: DecoderConfig, name: str, natural: str) -> bool:
    """Whether a model_type of the natural one's tensors is read back as this config."""
    kind = ARCHITECTURES.get(name)
    if kind is None or kind.write is None or kind.table is not ARCHITECTURES[natural].table:
        return False
    again = kind.read(Fields(kind.write(config), name))
    return dataclasses.replace(config, **again) == config
