"""Transformers: blocks, the decoder, the encoder and the encoder-decoder."""
