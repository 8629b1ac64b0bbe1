"""autocast beside models that carry their own policies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mpjax.errors import ConfigError
from mpjax.interpret import autocast, no_autocast
from mpjax.models import decoder

pytestmark = pytest.mark.usefixtures("fast_compile")

MODEL = decoder("tiny", "fp32", layers=1, width=16, heads=2)
PARAMS = MODEL.init(jax.random.key(0))
IDS = jnp.zeros((1, 4), jnp.int32)


def logits(params, ids):
    return MODEL.apply(params, ids)[0]


@pytest.mark.parametrize(
    "fn",
    [MODEL.apply, logits, jax.jit(logits), jax.grad(lambda params, ids: logits(params, ids).sum())],
    ids=["method", "function", "jit", "gradient"],
)
def test_policies_never_apply_twice(fn) -> None:
    with pytest.raises(ConfigError, match=r"carries its own Precision.*decoder\('small', 'bf16'\)"):
        autocast(fn, "bf16")(PARAMS, IDS)


def test_a_model_in_a_region_of_its_own_is_left_alone() -> None:
    w = jnp.ones((256, 3)) / 3

    def probe(params, ids):
        return no_autocast(logits)(params, ids) @ w

    ours = autocast(probe, "bf16", restore_dtypes=False)(PARAMS, IDS)
    low = (logits(PARAMS, IDS).astype(jnp.bfloat16)) @ w.astype(jnp.bfloat16)
    assert ours.dtype == jnp.bfloat16
    assert jnp.array_equal(ours, low)
