"""Flax Linen models whose every module takes its policy by path."""

from mpjax.models.config import DecoderConfig, decoder_config, size_names
from mpjax.models.decoder import Model, decoder

__all__ = ["DecoderConfig", "Model", "decoder", "decoder_config", "size_names"]
