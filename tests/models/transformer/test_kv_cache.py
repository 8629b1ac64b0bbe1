"""Decoding through the key/value cache against the whole forward pass."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.models import Decoder
from mpjax.precision import get_precision
from tests.models.shapes import FAST, IDS, logits, small, stirred

pytestmark = pytest.mark.usefixtures("fast_compile")

# relative to the largest logit; products of other shapes sum in another order before they round
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "fp16": 4e-3}


def _decode(model: Decoder, params: Any, *ways: list[int]) -> list[np.ndarray]:
    """Logits of IDS for each way of giving them to the model in parts."""
    step = jax.jit(lambda ids, state: model.apply(params, ids, state=state), compiler_options=FAST)
    results = []
    for parts in ways:
        state, out, at = model.init_cache(IDS.shape[0], 12), [], 0
        for part in parts:
            logits, state = step(IDS[:, at : at + part], state)
            out.append(np.asarray(logits, np.float32))
            at += part
        assert int(state["position"]) == at == IDS.shape[1]
        results.append(np.concatenate(out, axis=1))
    return results


@pytest.mark.parametrize(
    ("kind", "precision", "loop"),
    [
        ("gpt", "fp32", "scan"),
        ("llama", "fp32", "unroll"),
        ("llama", "bf16", "scan"),
        ("gpt", "fp16", "unroll"),
    ],
)
def test_parts_of_any_length_equal_the_whole(kind: str, precision: str, loop: str) -> None:
    model = small(precision, kind, loop=loop)
    params = stirred(model)
    whole = logits(model, params, IDS)
    for got in _decode(model, params, [1] * 9, [4, 1, 4]):
        assert np.abs(got - whole).max() < TOLERANCE[precision] * np.abs(whole).max()
    # the negative control: tokens that do not see the ones before them
    alone = logits(model, params, IDS.reshape(-1, 1)).reshape(whole.shape)
    assert np.abs(alone - whole).max() > 0.1 * np.abs(whole).max()


def test_the_cache_is_as_wide_as_the_products_of_any_layer() -> None:
    assert small("bf16").init_cache(1, 4)["layers"][0].dtype == jnp.bfloat16
    mixed = small(get_precision("bf16", rules=["decoder/layers/0=fp32"]))
    assert mixed.init_cache(1, 4)["layers"][0].dtype == jnp.float32
    params = stirred(mixed)
    whole = logits(mixed, params, IDS)
    (got,) = _decode(mixed, params, [4, 1, 4])
    assert np.abs(got - whole).max() < TOLERANCE["bf16"] * np.abs(whole).max()
