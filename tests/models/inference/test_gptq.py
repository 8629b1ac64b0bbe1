"""Weights rounded by the inputs that they meet: against GPTQ in numpy, and what it is good for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models import (
    Variant,
    compare,
    encoder,
    input_moments,
    quantize_weights,
    recurrent,
)
from mpjax.models.core.storage import Storage
from mpjax.models.inference.gptq import DAMPING, store_weighed
from tests.models.shapes import BATCH, IDS, logits, small, stirred

pytestmark = pytest.mark.usefixtures("fast_compile")

STORE = jax.jit(store_weighed, static_argnums=2)


def inputs(size: int, rank: int, seed: int = 0, tokens: int = 500) -> np.ndarray:
    """Rows whose numbers go together: few causes, and a little noise of their own."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rank, size))
    causes = rng.normal(size=(tokens, rank)) @ mixed
    return causes + 0.3 * rng.normal(size=(tokens, size))


def weights(size: int, outputs: int = 6, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(size, outputs)).astype(np.float32)


def lost(x: np.ndarray, w: np.ndarray, q: Any) -> float:
    return float(np.linalg.norm(x @ (w - np.asarray(q.dequantize()))))


def in_numpy(w: np.ndarray, moment: np.ndarray, scale: np.ndarray, start: np.ndarray) -> np.ndarray:
    """GPTQ in float64 for int4, row after row without blocks: the inverse itself is updated.

    With one scale for each output, its largest number is at an end and stays there.
    """
    ends = np.where(np.abs(w) == np.abs(w).max(0), 7 * np.sign(w), np.nan)
    ends[:, start.any(0) | (len(np.unique(scale[:, 0])) > 1)] = np.nan
    low = -8 if np.isnan(ends).all() else -7
    w, H = w.astype(np.float64), moment.astype(np.float64)
    inverse = np.linalg.inv(H + DAMPING * np.trace(H) / len(H) * np.eye(len(H)))
    out, left = np.empty(w.shape), list(np.argsort(-np.diag(H), kind="stable"))
    while left:
        i = left.pop(0)
        v = np.rint((w[i] - start[i]) / scale[i]).clip(low, 7)
        v = np.where(np.isnan(ends[i]), v, ends[i])
        out[i] = v
        error = (w[i] - (v * scale[i] + start[i])) / inverse[i, i]
        for j in left:
            w[j] -= error * inverse[i, j]
        # what is known of the rest once row i is fixed
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return out


@pytest.mark.parametrize("storage", ["int4@16", "int4@16+offset", "int4"])
@pytest.mark.parametrize("size", [32, 80])  # one block of rows, and one and a part
def test_values_are_those_of_numpy(size: int, storage: str) -> None:
    x, w = inputs(size, 6), weights(size)
    moment = (x.T @ x / len(x)).astype(np.float32)
    q = STORE(jnp.asarray(w), jnp.asarray(moment), Storage.parse(storage))
    group = size if storage == "int4" else 16
    scale = np.repeat(np.asarray(q.scales), group, 0)
    start = 0 * scale if q.offsets is None else np.repeat(np.asarray(q.offsets), group, 0)
    expected = in_numpy(w, moment, scale, start)
    nearest = np.rint((w - start) / scale).clip(-8, 7)
    alike, control = ((np.asarray(q.values, np.float64) == v).mean() for v in (expected, nearest))
    # float32 takes a number beside a tie the other way, and the rows behind it follow
    assert alike > 0.97 > 0.93 > control


@pytest.mark.parametrize("storage", ["int4@16", "int4@32+offset", "int4", "e2m1@nv(16)", "int8"])
def test_less_of_the_product_is_lost(storage: str) -> None:
    x, w = inputs(64, 6), weights(64)
    moment = jnp.asarray(x.T @ x / len(x), jnp.float32)
    form = Storage.parse(storage)
    q, plain = STORE(jnp.asarray(w), moment, form), form.store(jnp.asarray(w), 0)
    assert q.values.dtype == plain.values.dtype and q.tile == plain.tile
    other = inputs(64, 6, tokens=900)[500:]  # tokens that were not counted
    assert lost(other, w, q) < 0.6 * lost(other, w, plain)
    # of the weights themselves more is lost
    assert lost(np.eye(64), w, q) > lost(np.eye(64), w, plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("storage", ["int8", "e4m3"])
def test_rows_keep_their_values_when_a_recipe_quantises_them_again(
    storage: str, dtype: str
) -> None:
    x, w = inputs(64, 6), jnp.asarray(weights(64, 200), dtype)
    form = Storage.parse(storage)
    q = STORE(w, jnp.asarray(x.T @ x / len(x), jnp.float32), form)
    again = form.store(q.dequantize(), 0)
    np.testing.assert_array_equal(np.asarray(q.values), np.asarray(again.values))


@pytest.mark.parametrize("storage", ["int8", "int4@16", "e2m1@nv(16)"])
def test_pruned_weights_stay_pruned(storage: str) -> None:
    x, w = inputs(64, 6), weights(64)
    w[np.abs(w) < np.median(np.abs(w))] = 0
    moment = jnp.asarray(x.T @ x / len(x), jnp.float32)
    form = Storage.parse(storage)
    q, plain = STORE(jnp.asarray(w), moment, form), form.store(jnp.asarray(w), 0)
    assert (np.asarray(q.dequantize())[w == 0] == 0).all() and (w == 0).mean() == 0.5
    assert lost(x, w, q) < 0.8 * lost(x, w, plain)


def test_a_moment_without_a_factor_gives_no_weights() -> None:
    w, moment = jnp.asarray(weights(32)), -jnp.eye(32)
    assert np.isnan(np.asarray(STORE(w, moment, Storage.parse("int4@16")).dequantize())).all()


def test_inputs_that_do_not_go_together_gain_little() -> None:
    x, w = np.random.default_rng(0).normal(size=(5000, 64)), weights(64)
    moment = jnp.asarray(x.T @ x / len(x), jnp.float32)
    form = Storage.parse("int8")
    q, plain = STORE(jnp.asarray(w), moment, form), form.store(jnp.asarray(w), 0)
    assert 0.9 < lost(x, w, q) / lost(x, w, plain) < 1.05


def test_inputs_that_never_come_are_rounded_too() -> None:
    w = weights(32)
    moment = np.zeros((32, 32), np.float32)
    q = STORE(jnp.asarray(w), jnp.asarray(moment), Storage.parse("int4@16"))
    assert np.isfinite(np.asarray(q.dequantize())).all()
    assert (np.asarray(q.values, np.float32) == np.rint(w / np.repeat(q.scales, 16, 0))).all()
    moment[:16, :16] = np.eye(16)  # half of them
    q = STORE(jnp.asarray(w), jnp.asarray(moment), Storage.parse("int4@16"))
    assert np.isfinite(np.asarray(q.dequantize())).all()


def test_moments_are_those_of_what_the_kernels_see() -> None:
    model = small("fp32", "llama", loop="scan", remat="full")
    params = stirred(model)
    batches = [{"inputs": IDS[:1, :5]}, {"inputs": IDS[1:, :7]}]  # each token counts alike
    found = input_moments(model, params, batches)
    feature_D = np.concatenate([
        np.asarray(model.features(params, b["inputs"])[0][0], np.float64) for b in batches
    ])  # fmt: skip
    expected = feature_D.T @ feature_D / len(feature_D)
    np.testing.assert_allclose(found["decoder/head/kernel"], expected, rtol=1e-4, atol=1e-5)
    layers = "decoder/layers/"
    kernels = {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel"
    }
    assert {name: m.shape[-1] for name, m in found.items()} == {
        name: shape[-2] for name, shape in kernels.items()
    }
    same = (f"{layers}attention/query/kernel", f"{layers}attention/value/kernel")
    np.testing.assert_array_equal(found[same[0]], found[same[1]])  # they see the same
    assert np.abs(found[same[0]][0] - found[same[0]][1]).max() > 0.1  # and each layer its own
    # the first layer's: what the norm makes of the embedding
    ids = np.concatenate([np.asarray(b["inputs"])[0] for b in batches])
    x = np.asarray(params["decoder"]["embed"]["table"], np.float64)[ids]
    x /= np.sqrt(np.square(x).mean(-1, keepdims=True) + model.config.epsilon)
    x *= np.asarray(params["decoder"]["layers"]["norm_attention"]["scale"][0])
    np.testing.assert_allclose(found[same[0]][0], x.T @ x / len(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["decoder", "encoder"])
def test_padding_is_neither_read_nor_counted(family: str) -> None:
    model: Any = small("fp32", "llama")
    if family == "encoder":
        model = encoder("bert-tiny", "fp32", layers=1, width=16, heads=2, vocabulary=32, context=16,
                        head="masked")  # fmt: skip
    params = stirred(model)
    keep = np.arange(7) < np.array([[4], [7]])
    ids = np.where(keep, IDS[:2, :7], 9)
    expected = input_moments(model, params, [{"inputs": ids[:1, :4]}, {"inputs": ids[1:]}])
    for name, mask in (("keep", keep), ("attention_mask", keep.astype(np.int32))):
        found = input_moments(model, params, [{"inputs": ids, name: mask}])
        assert found.keys() == expected.keys()
        for path, moment in found.items():
            np.testing.assert_allclose(moment, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)
    unmasked = input_moments(model, params, [{"inputs": ids}])
    assert max(float(np.abs(unmasked[p] - expected[p]).max()) for p in expected) > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_a_model_says_more_nearly_what_it_said(kind: str) -> None:
    model = small("fp32", kind)
    params = stirred(model)
    rng = np.random.default_rng(3)
    texts = [{"inputs": jnp.asarray(rng.integers(0, 32, (8, 16)), jnp.int32)} for _ in range(4)]
    moments = input_moments(model, params, texts)
    whole = logits(model, params, IDS)

    def off(**options: Any) -> float:
        stored = quantize_weights(params, "int4@8", rules=["**/head=int4@8"][: kind == "llama"],
                                  **options)  # fmt: skip
        return float(np.square(logits(model, stored, IDS) - whole).mean())

    assert off(moments=moments) < 0.8 * off()


def test_variants_that_are_calibrated_take_the_moments() -> None:
    model = small()
    params = stirred(model)
    moments = input_moments(model, params, [BATCH])
    ways = [Variant(), Variant("int4@8"), Variant("int4@8", calibrated=True)]
    _, plain, calibrated = compare(model, params, [BATCH], ways, moments=moments)
    assert str(calibrated.variant) == "int4@8 weights (calibrated)"
    assert calibrated.weight_bytes == plain.weight_bytes
    assert calibrated.judged.loss != plain.judged.loss
    for none in (None, {}):
        with pytest.raises(ConfigError, match=r"int4@8 weights \(calibrated\) needs moments; pass"):
            compare(model, params, [BATCH], ways, moments=none)
    with pytest.raises(ConfigError, match="nothing is rounded to a grid with scales; drop"):
        compare(model, params, [BATCH], [Variant("bf16", calibrated=True)], moments=moments)


@pytest.mark.parametrize(
    "batch, message",
    [
        ([[1, 2]], r"a batch is a dict with inputs \(B, T\), not list; write"),
        ({"ids": IDS}, "not dict of ids; write"),
        ({"inputs": IDS, "segments": IDS}, "has segments; give windows"),
        ({"inputs": IDS, "keep": IDS[:1] > 0}, "keep has shape .1, .* give one for each token"),
        ({"inputs": IDS, "keep": IDS < 0}, "and 0 tokens, inputs"),
        ({"inputs": IDS, "attention_mask": np.cumsum(np.asarray(IDS) >= 0, 1) > 1}, "before text"),
        ({"inputs": IDS, "keep": IDS, "attention_mask": IDS}, "holds keep and attention_mask"),
        ({"inputs": IDS[0]}, r"inputs are int32 \(\d+,\); give token ids \(B, T\)"),
        ({"inputs": IDS[:0]}, "at least one"),
        ({"inputs": [[1, 2], [3]]}, "inputs are object"),
        ({"inputs": IDS / 2}, "inputs are float32"),
        ({"inputs": IDS + 1000}, "token ids from 1000 to .* vocabulary is 0 to 31; encode"),
        ({"inputs": -IDS - 1}, "token ids from -"),
    ],
)  # fmt: skip
def test_batches_that_are_no_text_are_named(batch: Any, message: str) -> None:
    model = small()
    with pytest.raises(ConfigError, match=f"^input_moments: .*{message}"):
        input_moments(model, stirred(model), [batch])


def test_lists_of_ids_and_generators_are_text() -> None:
    model = small()
    params = stirred(model)
    rows = np.asarray(IDS).tolist()
    expected = input_moments(model, params, [{"inputs": IDS}])
    found = input_moments(model, params, ({"inputs": ids} for ids in [rows]))
    jax.tree.map(np.testing.assert_array_equal, expected, found)


def test_other_models_are_named() -> None:
    model = recurrent("tiny", vocabulary=32)
    with pytest.raises(ConfigError, match="Recurrent is no decoder and no encoder; quantise it"):
        input_moments(model, {}, [BATCH])


def test_mistakes_are_named() -> None:
    model = small()
    params = stirred(model)
    with pytest.raises(ConfigError, match="input_moments: no batch; give some text"):
        input_moments(model, params, [])
    lost = jax.tree.map(lambda w: w.at[:].set(jnp.nan), params)
    with pytest.raises(ConfigError, match="kernel is multiplied by is not finite"):
        input_moments(model, lost, [BATCH])
    wrong = {"decoder/layers/mlp/up/kernel": jnp.eye(16)}
    with pytest.raises(ConfigError, match=r"up/kernel are \(16, 16\) where .* needs \(2, 16, 16\)"):
        quantize_weights(params, "int4", moments=wrong)
    with pytest.raises(ConfigError, match="called as the moments are, such as encoder/x; make"):
        quantize_weights(params, "int4", moments={"encoder/x": jnp.eye(16)})
    bad = {"decoder/layers/mlp/up/kernel": jnp.full((2, 16, 16), jnp.nan)}
    with pytest.raises(ConfigError, match="moments of decoder/.* are not finite; make them anew"):
        quantize_weights(params, "int4", moments=bad)
    with pytest.raises(ConfigError, match="moments are a dict of path -> moment .* not list"):
        quantize_weights(params, "int4", moments=[jnp.eye(16)])
    quantize_weights(params, "bf16", moments=wrong)  # a dtype has nothing to weigh
