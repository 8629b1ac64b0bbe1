"""Flax Linen models whose every module takes its policy by path."""

from mpjax.models.config import DecoderConfig, decoder_config, size_names
from mpjax.models.decoder import Model, decoder
from mpjax.models.generate import generate

__all__ = ["DecoderConfig", "Model", "decoder", "decoder_config", "generate", "size_names"]
