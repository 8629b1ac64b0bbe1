"""Targets, ids and padding that are none: NaN, one line or no effect, never another number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax import train
from mpjax.errors import ConfigError
from mpjax.models import Variant, compare, judge, recurrent, resnet
from mpjax.precision import parse_policy
from mpjax.tasks import Language, label_loss
from tests.models.shapes import BATCH, IDS, applied, drawn, logits, small, stirred

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.mark.parametrize("wrong", [-100, -1, 32, 40])
@pytest.mark.parametrize("chunk", [2, 8])
def test_a_target_that_is_no_token_is_nan_and_so_is_its_gradient(wrong: int, chunk: int) -> None:
    model = small(layers=1, loss_chunk=chunk)
    params = stirred(model)
    step = jax.jit(jax.value_and_grad(lambda p, b: model.loss(p, b)[0]))
    bad = BATCH | {"targets": BATCH["targets"].at[1, 3].set(wrong)}
    loss, grads = step(params, bad)
    assert np.isnan(loss) and np.isnan(grads["decoder"]["head"]["kernel"]).any()
    masked = BATCH | {"weights": jnp.ones((2, 8)).at[1, 3].set(0)}
    want = step(params, masked)
    got = step(params, bad | {"weights": masked["weights"]})
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)  # what weighs nothing may be anything
    assert np.isfinite(want[0])


@pytest.mark.parametrize(
    ("labels", "known"), [([0, 2], 2), ([0, -100], 1), ([0, -1], 0), ([0, 3], 0)]
)
def test_a_label_that_is_no_class_is_nan(labels: list[int], known: int) -> None:
    scores = np.array([[2.0, 0, 0], [0, 5, 0]])
    loss = label_loss(jnp.asarray(scores, jnp.float32), jnp.array(labels), parse_policy("f32"))
    each = np.log(np.exp(scores).sum(1)) - scores[[0, 1], np.maximum(labels, 0) % 3]
    assert np.isnan(loss) if not known else loss == pytest.approx(each[:known].mean())


@pytest.mark.parametrize("wrong", [-1, -32, 32])
def test_an_id_that_is_no_token_is_nan(wrong: int) -> None:
    model = small(layers=1)
    got = logits(model, stirred(model), IDS.at[0, 3].set(wrong))
    assert np.isnan(got[0]).all(), "a masked NaN is a NaN too"
    assert np.isfinite(got[1]).all()


def test_images_that_weigh_nothing_change_no_gradient_however_they_are_cut() -> None:
    rng = np.random.default_rng(0)
    model = resnet("tiny", widths=(4, 8), inputs=1)
    batch = {
        "inputs": rng.normal(size=(8, 8, 8, 1)).astype(np.float32),
        "targets": rng.integers(0, 10, 8),
        "weights": np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32),
    }
    got = []
    for parts in (1, 4):
        state, step = train.build(model, optax.sgd(1.0), accumulate=parts)
        state, metrics = step(state, batch)
        got.append((float(metrics["loss"]), jax.tree.map(np.asarray, state.params)))
    (loss, whole), (again, cut) = got
    assert loss == pytest.approx(again, rel=1e-6)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def _padded(side: str) -> dict[str, Any]:
    ways = {"left": (3, 0), "right": (0, 3)}[side]
    keep = np.pad(np.ones((2, 8), bool), ((0, 0), ways))
    rest = {name: np.pad(np.asarray(x), ((0, 0), ways)) for name, x in BATCH.items()}
    return rest | {"keep": keep, "weights": keep.astype(np.float32)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_cells_pass_over_padding(cell: str, side: str) -> None:
    model = recurrent("tiny", layers=2, width=16, vocabulary=32, cell=cell)
    params = drawn(model)
    loss = jax.jit(lambda batch: model.loss(params, batch)[0])
    assert float(loss(_padded(side))) == pytest.approx(float(loss(BATCH)), rel=1e-5)
    if side == "left":  # the negative control: padding that is read
        seen = {name: x for name, x in _padded(side).items() if name != "keep"}
        assert abs(float(loss(seen)) - float(loss(BATCH))) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_judged_by_nobody(side: str) -> None:
    model = small(layers=1)
    params = stirred(model)
    plain, padded = judge(model, params, [BATCH]), judge(model, params, [_padded(side)])
    assert padded.tokens == plain.tokens == 16
    assert padded.loss == pytest.approx(plain.loss, rel=1e-5)
    assert padded.accuracy == plain.accuracy
    assert Language().judge(model)(params, [_padded(side)])["loss"] == pytest.approx(plain.loss)
    with pytest.raises(ConfigError, match="keep is given beside a cache"):
        judge(model, params, [_padded(side)], cache="int8")


def test_a_model_that_is_broken_has_no_perplexity_but_a_row() -> None:
    model = small(layers=1)
    params = stirred(model)
    params = params | {
        "decoder": params["decoder"]
        | {"head": {"kernel": 1e6 * params["decoder"]["head"]["kernel"]}}
    }
    rows = compare(model, params, iter([BATCH]), [Variant(), Variant("int2@4")])
    assert [row.judged.perplexity for row in rows] == [np.inf, np.inf]
    lost = jax.tree.map(lambda x: x * jnp.nan, params)
    assert np.isnan(judge(model, lost, [BATCH]).perplexity)
    assert np.isnan(Language().judge(model)(lost, [BATCH])["perplexity"])


def test_weights_of_another_shape_are_refused() -> None:
    model = small(layers=1)
    with pytest.raises(ConfigError, match=r"weights: shape \(1, 4\) is not \(2, 8\)"):
        model.loss(stirred(model), BATCH | {"weights": jnp.ones((1, 4))})


@pytest.mark.parametrize("storage", ["", "int8", "e4m3"])
def test_a_token_beyond_the_cache_is_nan(storage: str) -> None:
    model = small(layers=1)
    params, state = stirred(model), model.init_cache(2, 4, storage)
    whole = logits(model, params, IDS[:, :4])
    for t in range(6):
        got, state = applied(model)(params, IDS[:, t : t + 1], state=state)
        if t < 4:
            np.testing.assert_allclose(got[:, 0], whole[:, t], atol=0.5 if storage else 1e-4)
        else:
            assert np.isnan(got).all()
    for ids, state in ((IDS[:, :5], model.init_cache(2, 4)), (IDS[:1, :1], model.init_cache(2, 4))):
        with pytest.raises(
            ConfigError, match="do not fit into one of 2 rows of 4; pass init_cache"
        ):
            model.apply(params, ids, state=state)
