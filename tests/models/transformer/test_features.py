"""What imported checkpoints need of a decoder: each against an independent account of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models import Decoder
from tests.models.shapes import BATCH, FAST, IDS, applied, drawn, small
from tests.models.transformer import oracle

pytestmark = pytest.mark.usefixtures("fast_compile")


def logits(model: Decoder, params: Any, ids: Any, **more: Any) -> np.ndarray:
    return np.asarray(applied(model)(params, ids, **more)[0])


PADS = np.array([3, 0])


def _numpy_logits(model: Decoder, params: Any, ids: Any) -> np.ndarray:
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    return np.stack([oracle.logits(model.config, exact, row) for row in np.asarray(ids)])


@pytest.mark.parametrize(
    "changes",
    [
        dict(head_width=6, qk_norm=True),
        dict(qkv_bias=True, window=3),
        dict(kind="gpt", activation="gelu_exact", norm_first=False, scale_embed=True),
        dict(kind="gpt", activation="relu", position="sinusoidal", norm_embed=True),
        dict(rope_scaling="llama3", rope_factor=8.0, rope_context=16),
        dict(rope_scaling="linear", rope_factor=4.0),
    ],
    ids=["head-width", "qkv-bias-window", "post-norm", "sinusoidal", "llama3", "linear"],
)
def test_logits_against_numpy(changes: dict[str, Any]) -> None:
    model = small(layers=1, **changes)
    params = drawn(model)
    want = _numpy_logits(model, params, IDS)
    got = logits(model, params, IDS)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())
    fields = {name: value for name, value in changes.items() if name in ("window", "rope_scaling")}
    if fields:  # the control: the field decides
        off = small(layers=1, **(changes | dict(window=0, rope_scaling="none")))
        assert np.abs(logits(off, params, IDS) - want).max() > 1e-2


def test_a_window_that_holds_all_is_none() -> None:
    model = small(layers=1)
    params = drawn(model)
    wide = logits(small(layers=1, window=IDS.shape[1]), params, IDS)
    np.testing.assert_array_equal(wide, logits(model, params, IDS))


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_padding_on_either_side_changes_no_token(kind: str) -> None:
    model = small(kind=kind, window=5, loop="scan")
    params, T = drawn(model), IDS.shape[1]
    alone = _numpy_logits(model, params, IDS[:1, PADS[0] :])[0]
    size = np.abs(alone).max()
    left = np.arange(T)[None] >= PADS[:, None]
    got = logits(model, params, IDS, keep=left)
    np.testing.assert_allclose(got[0, PADS[0] :], alone, rtol=0, atol=1e-5 * size)
    rolled = jnp.roll(IDS, -int(PADS[0]), axis=1)
    got = logits(model, params, rolled, keep=left[:, ::-1])
    np.testing.assert_allclose(got[0, : T - PADS[0]], alone, rtol=0, atol=1e-5 * size)
    seen = logits(model, params, IDS, keep=left | True)[
        0, PADS[0] :
    ]  # the control: padding taken for tokens
    assert np.abs(seen - alone).max() > 1e-2 * size
    # through the cache, in parts
    state, parts = model.init_cache(2, T, pads=PADS), []
    for at in range(0, T, 3):
        out, state = applied(model)(params, IDS[:, at : at + 3], state=state)
        parts.append(np.asarray(out))
    cached = np.concatenate(parts, axis=1)[0, PADS[0] :]
    np.testing.assert_allclose(cached, alone, rtol=0, atol=1e-5 * size)
    with pytest.raises(ConfigError, match="keep is given beside a cache"):
        jax.eval_shape(lambda p: model.apply(p, IDS, state=state, keep=left), params)


def test_tokens_without_weight_are_not_judged() -> None:
    model, chunks = small(layers=1), small(layers=1, loss_chunk=2)
    params, weights = drawn(model), jnp.zeros((2, 8)).at[0, :3].set(1).at[1, 4].set(2)
    loss = jax.jit(
        lambda p, t, w: model.loss(p, BATCH | {"targets": t, "weights": w})[0],
        compiler_options=FAST,
    )
    z = _numpy_logits(model, params, BATCH["inputs"])
    each = np.log(np.exp(z).sum(-1)) - np.take_along_axis(
        z, np.asarray(BATCH["targets"])[..., None], -1
    ).squeeze(-1)
    want = (each * np.asarray(weights)).sum() / 5
    got = float(loss(params, BATCH["targets"], weights))
    assert got == pytest.approx(want, rel=1e-5)
    assert got == float(loss(params, BATCH["targets"].at[1, 5:].set(0), weights))
    chunked = jax.jit(lambda p: chunks.loss(p, BATCH | {"weights": weights})[0])(params)
    assert float(chunked) == pytest.approx(want, rel=1e-5)
    assert float(loss(params, BATCH["targets"], weights * 0)) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": -1}, "window=-1 must not be negative"),
        ({"head_width": 3}, "rotary positions need an even head width, head_width=3"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' is unknown; known: none linear llama3"),
        ({"rope_scaling": "linear", "position": "learned"}, "rope_scaling='linear' stretches"),
        ({"rope_low": 4.0}, "rope_low=4.0 must be below rope_high=4.0"),
        ({"rope_factor": 0.0}, "rope_factor=0.0 must be positive"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)
