"""Flax Linen models whose every module takes its policy by path."""

from mpjax.models.inference.generate import beam_search, generate, stream
from mpjax.models.inference.gptq import input_moments
from mpjax.models.inference.perplexity import Variant, compare, judge
from mpjax.models.inference.prompt import left_pad
from mpjax.models.inference.quantize_weights import quantize_weights, weight_report
from mpjax.models.inference.weight_file import load_weights, save_weights
from mpjax.models.recurrent.config import RecurrentConfig, recurrent_config
from mpjax.models.recurrent.recurrent import Recurrent, recurrent
from mpjax.models.resnet.config import ResNetConfig, resnet_config
from mpjax.models.resnet.resnet import ResNet, resnet
from mpjax.models.transformer.decoder import Model, decoder
from mpjax.models.transformer.decoder_config import DecoderConfig, decoder_config, size_names
from mpjax.models.transformer.encoder import Encoder, encoder
from mpjax.models.transformer.encoder_config import (
    EncoderConfig,
    encoder_config,
    encoder_size_names,
)
from mpjax.models.transformer.seq2seq import Seq2Seq, seq2seq
from mpjax.models.transformer.seq2seq_config import (
    Seq2SeqConfig,
    seq2seq_config,
    seq2seq_size_names,
)

__all__ = [
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "Model",
    "Recurrent",
    "RecurrentConfig",
    "ResNet",
    "ResNetConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "Variant",
    "beam_search",
    "compare",
    "decoder",
    "decoder_config",
    "encoder",
    "encoder_config",
    "encoder_size_names",
    "generate",
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
    "seq2seq_size_names",
    "size_names",
    "stream",
    "weight_report",
]
