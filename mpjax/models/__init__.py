"""Flax Linen models whose every module takes its policy by path."""

from __future__ import annotations

from typing import Any

from mpjax.lazy import lazy_names
from mpjax.models.core.storage import Storage, stored_bytes
from mpjax.models.inference.generate import beam_search, generate, stream
from mpjax.models.inference.gptq import input_moments
from mpjax.models.inference.perplexity import Variant, compare, judge
from mpjax.models.inference.prompt import left_pad
from mpjax.models.inference.quantize_weights import has_scales, quantize_weights, weight_report
from mpjax.models.inference.sampling import Sampling
from mpjax.models.inference.weight_file import load_weights, save_weights
from mpjax.models.recurrent.config import RecurrentConfig, recurrent_config
from mpjax.models.recurrent.recurrent import Recurrent, recurrent
from mpjax.models.resnet.config import ResNetConfig, resnet_config
from mpjax.models.resnet.resnet import ResNet, resnet
from mpjax.models.transformer.decoder import Decoder, decoder
from mpjax.models.transformer.decoder_config import DecoderConfig, decoder_config, decoder_sizes
from mpjax.models.transformer.encoder import Encoder, encoder
from mpjax.models.transformer.encoder_config import EncoderConfig, encoder_config, encoder_sizes
from mpjax.models.transformer.kv_cache import cache_storage
from mpjax.models.transformer.seq2seq import Seq2Seq, seq2seq
from mpjax.models.transformer.seq2seq_config import Seq2SeqConfig, seq2seq_config, seq2seq_sizes

_RENAMED = {
    "Model": "Decoder", "encoder_size_names": "encoder_sizes",
    "seq2seq_size_names": "seq2seq_sizes", "size_names": "decoder_sizes",
}  # fmt: skip

__all__ = [
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "Decoder",
    "Recurrent",
    "RecurrentConfig",
    "ResNet",
    "ResNetConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Sampling",
    "Storage",
    "Variant",
    "beam_search",
    "cache_storage",
    "compare",
    "decoder",
    "decoder_config",
    "encoder",
    "encoder_config",
    "encoder_sizes",
    "generate",
    "has_scales",
    "input_moments",
    "judge",
    "left_pad",
    "load_weights",
    "quantize_weights",
    "recurrent",
    "recurrent_config",
    "resnet",
    "resnet_config",
    "save_weights",
    "seq2seq",
    "seq2seq_config",
    "seq2seq_sizes",
    "decoder_sizes",
    "stored_bytes",
    "stream",
    "weight_report",
]


def __getattr__(name: str) -> Any:
    return lazy_names(__name__, {}, _RENAMED)(name)
