"""Flax Linen models whose every module takes its policy by path."""

from mpjax.models.config import DecoderConfig, decoder_config, size_names
from mpjax.models.decoder import Model, decoder
from mpjax.models.encoder import Encoder, encoder
from mpjax.models.encoder_config import EncoderConfig, encoder_config, encoder_size_names
from mpjax.models.generate import generate
from mpjax.models.recurrent import Recurrent, recurrent
from mpjax.models.recurrent_config import RecurrentConfig, recurrent_config
from mpjax.models.resnet import ResNet, resnet
from mpjax.models.resnet_config import ResNetConfig, resnet_config

__all__ = [
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "Model",
    "Recurrent",
    "RecurrentConfig",
    "ResNet",
    "ResNetConfig",
    "decoder",
    "decoder_config",
    "encoder",
    "encoder_config",
    "encoder_size_names",
    "generate",
    "recurrent",
    "recurrent_config",
    "resnet",
    "resnet_config",
    "size_names",
]
