"""Models in float16 whose residual stream is far above 256, against float64."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from mpjax.models import resnet
from tests.models.resnet.test_resnet import IMAGES
from tests.models.resnet.test_resnet import SIZE as RESNET
from tests.models.resnet.test_resnet import oracle as resnet_logits
from tests.models.shapes import BATCH, IDS, small, stirred
from tests.models.transformer import oracle

pytestmark = pytest.mark.usefixtures("fast_compile")
LOW = ("low-fp16", "pure-fp16", "O3")


def large(precision: str, kind: str = "llama") -> tuple[Any, Any]:
    """A decoder whose embeddings, and so its residual stream, are about 600."""
    # a tied head would multiply the logits too
    model = small(precision, kind=kind, layers=2, tied=False)
    params = stirred(model)
    table = params["decoder"]["embed"]["table"]
    return model, jax.tree.map(lambda p: p * 3000 if p is table else p, params)


@pytest.mark.parametrize(
    ("precision", "kind"), [*((name, "llama") for name in LOW), ("low-fp16", "gpt")]
)
def test_a_large_residual_stream_gives_right_logits(precision: str, kind: str) -> None:
    model, params = large(precision, kind)
    stream = np.abs(np.asarray(params["decoder"]["embed"]["table"], np.float64)).mean()
    assert stream > 400
    wide = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    want = oracle.logits(model.config, wide, IDS[0, :8])
    got = np.asarray(jax.jit(model.apply)(params, IDS[:1, :8])[0][0], np.float64)
    assert np.abs(got - want).max() < 0.01 * want.std()


def test_its_gradients_are_those_of_float32() -> None:
    model, params = large("pure-fp16")
    exact = small("fp32", layers=2)
    wide = jax.tree.map(lambda p: p.astype("float32"), params)

    def gradients(model: Any, params: Any) -> Any:
        return jax.jit(jax.grad(lambda p: 1024 * model.loss(p, BATCH)[0]))(params)

    got, want = gradients(model, params), gradients(exact, wide)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b), path


def test_a_residual_network_of_large_images() -> None:
    model = resnet("tiny", "low-fp16", **RESNET)
    params = stirred(model)
    want = resnet_logits(params, np.asarray(IMAGES) * 2000, 2)
    got = np.asarray(jax.jit(model.apply)(params, IMAGES * 2000)[0], np.float64)
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
