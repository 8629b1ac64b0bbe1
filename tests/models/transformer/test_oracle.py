"""The model against a bare numpy decoder, and each option against its absence."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from tests.models.shapes import BATCH, T, judged, logits, loss_and_gradients, small, stirred
from tests.models.transformer import oracle

pytestmark = pytest.mark.usefixtures("fast_compile")

INPUTS, TARGETS = BATCH["inputs"], BATCH["targets"]
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt": dict(kind="gpt"),
    "llama": dict(kind="llama"),
    "gpt-separate": dict(kind="gpt", tied=False),
    "llama-multi-query-qk-norm-cap": dict(kv_heads=1, qk_norm=True, logit_cap=2.0, tied=True),
    "gpt-rotary-swiglu-rms": dict(kind="gpt", norm="rms", position="rotary", activation="swiglu"),
}


def _numpy_logits(model: Any, params: Any) -> np.ndarray:
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    return np.stack([oracle.logits(model.config, params, row) for row in np.asarray(INPUTS)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_against_numpy(variant: str) -> None:
    model = small(**VARIANTS[variant])
    params = stirred(model)
    want = _numpy_logits(model, params)
    np.testing.assert_allclose(
        logits(model, params, INPUTS), want, rtol=0, atol=1e-5 * np.abs(want).max()
    )


@pytest.mark.parametrize("variant", ["gpt", "llama-multi-query-qk-norm-cap"])
def test_loss_against_numpy(variant: str) -> None:
    model = small(**VARIANTS[variant], z_loss=0.01)
    params = stirred(model)
    z = _numpy_logits(model, params)
    log_z = np.log(np.exp(z).sum(-1))
    picked = np.take_along_axis(z, np.asarray(TARGETS)[..., None], -1)[..., 0]
    without, penalty = (log_z - picked).mean(), 0.01 * (log_z**2).mean()
    assert judged(model, params) == pytest.approx(without, rel=1e-5)
    trained, _ = loss_and_gradients(model)  # z-loss is there in training, and only there
    assert float(trained) == pytest.approx(without + penalty, rel=1e-5)
    assert penalty > 1e-2


@pytest.mark.parametrize(
    "changes",
    [
        dict(norm="layer"),
        dict(position="learned"),
        dict(activation="gelu", mlp_width=64),
        dict(logit_cap=1.0),
        dict(rope_theta=100.0),
        dict(epsilon=0.1),
        dict(qk_norm=True),
        dict(kv_heads=1),
        dict(tied=True),
        dict(bias=True),
        dict(mlp_width=32),
    ],
    ids=lambda c: next(iter(c)),
)
def test_each_option_changes_the_function(changes: dict[str, Any]) -> None:
    a, b = (logits(m, stirred(m), INPUTS) for m in (small(layers=1), small(layers=1, **changes)))
    assert np.abs(a - b).max() > 1e-3


def test_grouped_heads_equal_repeated_key_value_weights() -> None:
    grouped, full = small(kv_heads=2), small(kv_heads=4)
    params = stirred(grouped)
    attention = params["decoder"]["layers"]["attention"]
    wide = dict(attention)
    for name in ("key", "value"):
        kernel = attention[name]["kernel"].reshape(2, 16, 2, 4)
        wide[name] = {"kernel": jnp.repeat(kernel, 2, axis=2).reshape(2, 16, 16)}
    layers = params["decoder"]["layers"] | {"attention": wide}
    repeated = {"decoder": params["decoder"] | {"layers": layers}}
    a, b = logits(grouped, params, INPUTS), logits(full, repeated, INPUTS)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(a).max())


def test_a_tied_head_is_the_embedding_and_takes_both_gradients() -> None:
    tied, separate = small(tied=True), small(tied=False)
    params = stirred(tied)
    assert "head" not in params["decoder"]
    table = params["decoder"]["embed"]["table"]
    copied = {"decoder": params["decoder"] | {"head": {"kernel": table.T}}}
    loss, grads = loss_and_gradients(tied)
    other, apart = jax.jit(jax.value_and_grad(lambda p: separate.loss(p, BATCH)[0]))(copied)
    assert float(loss) == pytest.approx(float(other), rel=1e-6)
    both = apart["decoder"]["embed"]["table"] + apart["decoder"]["head"]["kernel"].T
    ours = grads["decoder"]["embed"]["table"]
    scale = np.abs(np.asarray(both)).max()
    np.testing.assert_allclose(np.asarray(ours), np.asarray(both), rtol=0, atol=1e-6 * scale)


def test_the_future_does_not_change_the_past() -> None:
    model = small("bf16")
    params = stirred(model)
    a, b = logits(model, params, INPUTS), logits(model, params, INPUTS.at[:, 5].set(31))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 1e-2


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_dropout_is_drawn_by_key_and_off_in_evaluation(loop: str) -> None:
    model, plain = small(dropout=0.5, loop=loop), small(loop=loop)
    params = stirred(plain)
    train = jax.jit(lambda key: model.loss(params, BATCH, key=key, train=True)[0])
    first, again, second = (float(train(jax.random.key(seed))) for seed in (0, 0, 1))
    assert first == again != second
    assert judged(model, params) == judged(plain, params) != first
    with pytest.raises(ConfigError, match="dropout needs a key"):
        jax.eval_shape(lambda p: model.loss(p, BATCH, train=True), params)


def test_scan_and_unroll_drop_the_same_numbers() -> None:
    losses = [loss_and_gradients(small(dropout=0.5, loop=n))[0] for n in ("scan", "unroll")]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


def test_a_sequence_longer_than_the_position_table_is_refused() -> None:
    model = small(kind="gpt", context=T - 1)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ConfigError, match="sequence of 8 tokens is longer than context=7; set"):
        jax.eval_shape(model.apply, params, INPUTS)
    with pytest.raises(ConfigError, match="cache of 8 tokens is longer than context=7"):
        model.init_cache(1, T)
    small(kind="llama", context=T - 1).init_cache(1, T)  # rotary positions have no table


def test_an_id_outside_the_vocabulary_does_not_pass_for_another() -> None:
    model = small()
    assert np.isnan(logits(model, stirred(model), INPUTS.at[0, 0].set(32))[0]).all()
