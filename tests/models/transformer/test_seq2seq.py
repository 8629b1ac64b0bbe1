"""The encoder-decoder against numpy; decoding, padding, policies and training."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models import Seq2Seq, seq2seq
from mpjax.precision import get_precision
from tests.models.shapes import FAST, IDS, applied, drawn
from tests.models.transformer import seq2seq_oracle
from tests.ops.jaxprs import equations

pytestmark = pytest.mark.usefixtures("fast_compile")

SOURCE = jnp.asarray(np.random.default_rng(3).integers(0, 32, (2, 6)), jnp.int32)
KEEP = jnp.asarray(np.arange(6)[None] < np.array([[6], [4]]))
BATCH = {"source": SOURCE, "inputs": IDS[:, :-1], "targets": IDS[:, 1:]}
MODERN = dict(
    norm_first=True, position="rotary", activation="swiglu", norm="rms", bias=False, tied=False,
    scale_embed=False, source_vocabulary=40, kv_heads=2,
)  # fmt: skip


def small(precision: Any = "fp32", **changes: Any) -> Seq2Seq:
    """An encoder of three layers and a decoder of two, of width 16."""
    size = dict(vocabulary=32, layers=2, encoder_layers=3, width=16, heads=4, loop="scan")
    return seq2seq("seq2seq-tiny", precision, **(size | changes))


def logits(model: Seq2Seq, params: Any, **inputs: Any) -> np.ndarray:
    batch = {"source": SOURCE, "inputs": BATCH["inputs"]} | inputs
    return np.asarray(applied(model)(params, batch)[0], np.float32)


def test_logits_against_numpy() -> None:
    model = small()
    params = drawn(model)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rows = zip(np.asarray(SOURCE), np.asarray(BATCH["inputs"]), strict=True)
    want = np.stack([seq2seq_oracle.logits(model.config, exact, *row) for row in rows])
    np.testing.assert_allclose(logits(model, params), want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("changes", [{}, MODERN], ids=["original", "modern"])
def test_decoding_with_padding_equals_the_whole(changes: dict[str, Any]) -> None:
    model = small(encoder_layers=1, **changes)
    params = drawn(model)
    whole = logits(model, params, source_keep=KEEP)
    start = jax.jit(
        lambda p: model.start(p, SOURCE, length=12, source_keep=KEEP), compiler_options=FAST
    )
    state, out = start(params), []
    for at in range(0, 8, 2):
        got, state = applied(model)(params, BATCH["inputs"][:, at : at + 2], state=state)
        out.append(np.asarray(got))
    size = np.abs(whole).max()
    np.testing.assert_allclose(np.concatenate(out, 1), whole, rtol=0, atol=1e-5 * size)
    # padding of the source is not seen; the control: without keep it is
    other = SOURCE.at[1, 4:].set(31 - SOURCE[1, 4:])
    np.testing.assert_array_equal(logits(model, params, source=other, source_keep=KEEP), whole)
    every = jnp.ones_like(KEEP)
    seen = logits(model, params, source=other, source_keep=every)
    seen = seen - logits(model, params, source_keep=every)
    assert np.abs(seen[1]).max() > 1e-3
    assert np.abs(seen[0]).max() == 0


def _loss(model: Seq2Seq, **changes: Any) -> Any:
    return lambda p: model.loss(p, BATCH | changes)[0]


def test_gradients_reach_all_and_weights_leave_targets_out() -> None:
    model = small(norm_first=True, layers=1, encoder_layers=1)
    params, weights = drawn(model), jnp.ones((2, 8)).at[1, 5:].set(0)
    value = jax.jit(
        lambda p, t: jax.value_and_grad(_loss(model, targets=t, weights=weights))(p),
        compiler_options=FAST,
    )
    loss, grads = value(params, BATCH["targets"])
    assert all(float(jnp.max(jnp.abs(g))) > 0 for g in jax.tree.leaves(grads))
    again, _ = value(params, BATCH["targets"].at[1, 5:].set(0))
    assert float(loss) == float(again)
    other, _ = value(params, BATCH["targets"].at[1, 4].set(0))
    assert float(loss) != float(other)


def test_a_rule_on_a_path_acts_there_only() -> None:
    rules = [
        "decoder/layers/1/cross_attention=p=f32,c=f16,o=f16",
        "encoder/layers/2/mlp=fp32",
        "decoder/head=p=f32,c=f16,o=f32",
    ]
    model = small(get_precision("bf16", rules=rules), loop="unroll")
    params = jax.eval_shape(model.init, jax.random.key(0))
    dots = [e for e in equations(_loss(model), params) if e.primitive.name == "dot_general"]
    found = [e.invars[0].aval.dtype.name for e in dots]
    # of attention: four projections, scores and values; of the MLP: two
    assert found.count("float16") == 6 + 1
    assert found.count("float32") == 2
    assert len(found) == 3 * (6 + 2) + 2 * (6 + 6 + 2) + 1


def test_delayed_scaling_threads_both_halves() -> None:
    model = small("fp8-delayed", layers=1, encoder_layers=1)
    inputs = {name: BATCH[name] for name in ("source", "inputs")}
    _, state = applied(model)(drawn(model), inputs, state=model.init_state())
    assert set(state["amax"]) == {"encoder", "decoder"}
    is_history = lambda x: hasattr(x, "observed_amax")  # noqa: E731
    histories = jax.tree.leaves(state["amax"], is_leaf=is_history)
    assert len(histories) == 6 + 10  # products of a block of each half
    # of x and W; that of dy comes with the gradient
    assert all((np.asarray(h.observed_amax)[:, :2] > 0).all() for h in histories)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (IDS, r"without a state from start\(\) the input is a dict of source"),
        ({"inputs": IDS}, r"without a state from start\(\)"),
        (
            {"source": SOURCE, "inputs": IDS, "source_keep": KEEP[:, :2]},
            r"source_keep has shape \(2, 2\), source \(2, 6\)",
        ),
    ],
    ids=["ids", "no-source", "shape"],
)
def test_bad_inputs_are_named(inputs: Any, message: str) -> None:
    model = small(layers=1)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ConfigError, match=message) as caught:
        jax.eval_shape(lambda p: model.apply(p, inputs), params)
    assert "\n" not in str(caught.value)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ConfigError, match="encoder_layers=-1 must not be negative"):
        small(encoder_layers=-1)
    with pytest.raises(ConfigError, match="unknown size 'seq2seq-tin'; did you mean seq2seq-tiny"):
        seq2seq("seq2seq-tin")
    with pytest.raises(ConfigError, match="sinusoidal positions need an even width, width=15"):
        small(width=15, heads=3)
    with pytest.raises(ConfigError, match="encoder/layers/3/mlp.* matches no path"):
        small(get_precision("bf16", rules=["encoder/layers/3/mlp=fp32"]))
