"""The architectures that are known: names, settings and the model of ours that each one is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mpjax.errors import ConfigError
from mpjax.models.config import DecoderConfig
from mpjax.models.decoder import decoder
from mpjax.models.hf import decoder_fields as fields
from mpjax.models.hf.checkpoint import Checkpoint
from mpjax.models.hf.fields import Fields
from mpjax.models.hf.weights import GPT2, LLAMA, Table


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a `model_type` of transformers is here.

    Args:
      title: the class of transformers that an export names.
      prefix: of the names of its base model, which a checkpoint of that alone leaves out.
      table: our leaves and their tensors.
      read: config.json -> fields of our config.
      write: our config -> config.json.
      make: the model of a Precision, these fields, and the user's changes to them.
      copies: tensors that may repeat another one, where the head is tied.
      buffers: endings of names that hold no weight.
    """

    title: str
    prefix: str
    table: Table
    read: Callable[[Fields], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    make: Callable[[Any, dict[str, Any], dict[str, Any]], Any]
    copies: dict[str, str]
    buffers: tuple[str, ...]


def _decoder(precision: Any, settings: dict[str, Any], changes: dict[str, Any]) -> Any:
    return decoder(DecoderConfig(**settings), precision, **changes)


def _llama(title: str, read: Any, write: Any) -> Architecture:
    embed = "model.embed_tokens.weight"
    return Architecture(
        title, "model.", LLAMA, read, write, _decoder,
        copies={"lm_head.weight": embed}, buffers=("rotary_emb.inv_freq",),
    )  # fmt: skip


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        "GPT2LMHeadModel", "transformer.", GPT2, fields.read_gpt2, fields.write_gpt2, _decoder,
        copies={"lm_head.weight": "transformer.wte.weight"},
        buffers=(".attn.bias", ".attn.masked_bias"),  # the causal mask
    ),
    "llama": _llama("LlamaForCausalLM", fields.read_llama, fields.write_llama),
    "mistral": _llama("MistralForCausalLM", fields.read_mistral, fields.write_mistral),
    "qwen2": _llama("Qwen2ForCausalLM", fields.read_qwen2, fields.write_qwen),
    "qwen3": _llama("Qwen3ForCausalLM", fields.read_qwen3, fields.write_qwen),
}  # fmt: skip


def architecture_of(checkpoint: Checkpoint, named: str | None) -> Architecture:
    """Returns the architecture that a checkpoint says it is, or that the user says.

    Raises:
      ConfigError: an unknown one, none, or two.
    """
    said = checkpoint.config.get("model_type")
    if named is not None and said is not None and named != said:
        raise ConfigError(
            f"{checkpoint.config_file}: model_type={said!r}, but architecture={named!r} was asked"
            " for; leave that out"
        )
    kind = named or said
    if kind is None:
        raise ConfigError(
            f"{checkpoint.config_file}: no model_type; pass architecture=, one of"
            f" {' '.join(ARCHITECTURES)}"
        )
    if kind not in ARCHITECTURES:
        raise ConfigError(
            f"{checkpoint.config_file}: unknown architecture {kind!r}; known:"
            f" {' '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[kind]


def architecture_name(config: Any) -> str:
    """Returns the model_type that has the shape of a config of ours.

    Raises:
      ConfigError: none has.
    """
    if isinstance(config, DecoderConfig):
        return fields.decoder_architecture(config)
    raise ConfigError(
        f"export: {type(config).__name__} has no architecture of transformers that we know;"
        f" expected one of {' '.join(ARCHITECTURES)}"
    )
