"""Sizes by name, and what a configuration refuses."""

from __future__ import annotations

import math
from typing import Any

import jax
import pytest

from mpjax.errors import ConfigError
from mpjax.models import DecoderConfig, decoder, decoder_config, decoder_sizes


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama3-8b", 8_030_261_248),
    ],
)
def test_published_parameter_counts(size: str, count: int) -> None:
    params = jax.eval_shape(decoder(size).init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


def test_every_size_builds() -> None:
    for size in decoder_sizes():
        assert decoder_config(size).width % decoder_config(size).heads == 0


def test_derived_sizes() -> None:
    assert decoder_config("tiny", activation="gelu").hidden == 4 * 128
    assert decoder_config("tiny", activation="swiglu", width=96).hidden == 256  # 8/3 of 96
    assert decoder_config("tiny", mlp_width=40).hidden == 40
    assert decoder_config("tiny", heads=8, kv_heads=2).groups == 2
    assert decoder_config("tiny", heads=8).groups == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"head_bias": True},
            "head_bias=True with tied=True; .* set tied=False or head_bias=False",
        ),
        ({"vocabulary": 0}, "vocabulary=0 must be at least 1"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"width": -4}, "width=-4 must be at least 1"),
        ({"heads": 0}, "heads=0 must be at least 1"),
        ({"context": 0}, "context=0 must be at least 1"),
        ({"kv_heads": -1}, "kv_heads=-1 must not be negative"),
        ({"mlp_width": -1}, "mlp_width=-1 must not be negative"),
        ({"logit_cap": -1.0}, "logit_cap=-1.0 must not be negative"),
        ({"z_loss": -1.0}, "z_loss=-1.0 must not be negative"),
        ({"loss_chunk": -1}, "loss_chunk=-1 must not be negative"),
        ({"norm": "batch"}, "norm='batch' is unknown; known: layer rms"),
        ({"position": "alibi"}, "position='alibi' is unknown; known: learned sinusoidal rotary"),
        (
            {"activation": "silu"},
            "activation='silu' is unknown; known: gelu gelu_exact relu swiglu",
        ),
        ({"loop": "while"}, "loop='while' is unknown; known: auto scan unroll"),
        ({"remat": "some"}, "remat='some' is unknown; known: none full dots dots_no_batch"),
        ({"kernel": "flash"}, "kernel='flash' is unknown; known: auto xla cudnn"),
        ({"width": 130}, "width=130 is not a multiple of heads=4"),
        ({"kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        ({"width": 12}, "rotary positions need an even head width, width/heads=3"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout=-0.1 must be in \[0, 1\)"),
        ({"epsilon": 0.0}, "epsilon=0.0 must be positive"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be positive"),
        ({"wdith": 128}, "unknown field 'wdith'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        decoder_config("tiny", **changes)
    assert "\n" not in str(caught.value)


def test_an_unknown_size_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown size 'gpt-2'; did you mean gpt2"):
        decoder("gpt-2")


def test_a_configuration_is_a_size_too() -> None:
    config = DecoderConfig(layers=1, width=16, heads=2)
    assert decoder(config).config == config
    assert decoder(config, layers=2).config.layers == 2
    with pytest.raises(ConfigError, match="unknown field"):
        decoder(config, depth=2)
