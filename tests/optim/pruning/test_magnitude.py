"""Magnitude pruning: against numpy's order, through update rules, formats, skips and saves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from mpjax.errors import ConfigError
from mpjax.formats import quantize
from mpjax.optim import (
    cubic_sparsity,
    prune_weights,
    pruned,
    sparsity_by_path,
    store_weights,
    wrap,
)
from mpjax.precision import get_precision
from mpjax.train import init_state, parse_mesh, state_shardings
from mpjax.train.checkpoint.checkpointer import Checkpointer
from tests.optim.scaled_step import scaled_step

pytestmark = pytest.mark.usefixtures("fast_compile")


def weights(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "embed": {"table": draw(16, 8)},
        "layers": {"up": {"kernel": draw(3, 8, 12) * jnp.array([1.0, 2.0, 4.0])[:, None, None]},
                   "norm": {"scale": draw(3, 8)}},
        "head": {"kernel": draw(8, 16), "bias": draw(16)},
    }  # fmt: skip


PRUNED = (("embed", "table"), ("layers", "up", "kernel"), ("head", "kernel"))


def at(tree: Any, path: tuple[str, ...]) -> np.ndarray:
    for part in path:
        tree = tree[part]
    return np.asarray(tree)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def pruning(share: float, **options: Any) -> Any:
    """Compiled whole: operation by operation takes several times as long to compile."""
    return jax.jit(lambda params: prune_weights(params, share, **options))


@pytest.mark.parametrize("share", [0.3, 0.75])
def test_global_pruning_is_numpys_quantile_over_all_matrices(share: float) -> None:
    before = weights()
    after = pruning(share)(before)
    flat = np.concatenate([np.abs(at(before, p)).reshape(-1) for p in PRUNED])
    limit = np.quantile(flat, share)
    for path in PRUNED:
        w = at(before, path)
        np.testing.assert_array_equal(at(after, path), np.where(np.abs(w) > limit, w, 0))
    for path in (("layers", "norm", "scale"), ("head", "bias")):  # vectors are left alone
        np.testing.assert_array_equal(at(after, path), at(before, path))


def test_pruning_by_layer_takes_its_share_of_each_matrix_of_a_stack() -> None:
    before = weights()
    after, whole = pruning(0.5, scope="layer")(before), pruning(0.5)(before)
    for x, w in zip(at(after, PRUNED[1]), at(before, PRUNED[1]), strict=True):
        limit = np.quantile(np.abs(w), 0.5)
        np.testing.assert_array_equal(x, np.where(np.abs(w) > limit, w, 0))
    shares = (at(whole, PRUNED[1]) == 0).mean((1, 2))
    assert shares[0] > shares[1] > shares[2]  # the larger layers lose less where all compete


def test_what_is_kept_is_not_pruned_and_does_not_count() -> None:
    after = sparsity_by_path(pruning(0.5, keep=["embed"])(weights()))
    assert after["embed/table"] == after["head/bias"] == 0
    assert after["head/kernel"] > 0 and after["layers/up/kernel"] > 0
    n, zeros = 8 * 16 + 3 * 96, after["head/kernel"] * 128 + after["layers/up/kernel"] * 288
    assert zeros == n / 2


def test_ties_are_broken_so_that_the_share_is_exact() -> None:
    """Weights stored in fp8 have few magnitudes: a threshold would take too many or too few."""
    stored = store_weights({"w": weights()["head"]["kernel"]})
    values = np.abs(np.asarray(stored["w"].dequantize()))
    after = pruning(0.3)(stored)["w"]
    assert int((np.asarray(after.dequantize()) == 0).sum()) == round(0.3 * 128)
    assert np.unique(values).size < 128 and bits(after.scales) == bits(stored["w"].scales)
    assert sparsity_by_path({"w": jnp.zeros((2, 2)), "v": stored["w"]})["w"] == 1
    same = pruning(0.25)({"w": jnp.ones((4, 5))})["w"]
    assert int((np.asarray(same) == 0).sum()) == 5
    assert bits(pruning(0.0)(stored)) == bits(stored)


@pytest.mark.parametrize(
    ("format", "scaling"),
    [("e4m3", "tensor"), ("int8", "row"), ("int4", "block(1x8)"), ("e2m1", "nv(16)")],
)
def test_a_pruned_weight_that_is_quantised_keeps_its_zeros(format: str, scaling: str) -> None:
    w = pruning(0.5)({"w": weights()["head"]["kernel"]})["w"]
    found = np.asarray(jax.jit(lambda w: mpjax.quantize(w, format, scaling).dequantize())(w))
    assert not found[np.asarray(w) == 0].any() and (np.asarray(w) == 0).sum() == 64


def test_weights_with_offsets_have_no_zero_to_prune_to() -> None:
    params = {"kernel": quantize(jnp.ones((4, 8)), "int4", "row", offset=True)}
    with pytest.raises(ConfigError, match="kernel has offsets, so no zero; prune before"):
        prune_weights(params, 0.5)


def test_the_cubic_schedule_is_the_papers_equation() -> None:
    def oracle(t: int, final: float, begin: int, end: int, initial: float) -> float:
        t = min(max(t, begin), end)
        return final + (initial - final) * (1 - (t - begin) / (end - begin)) ** 3

    for t in (0, 10, 11, 40, 99, 110, 500):
        assert float(cubic_sparsity(t, 0.9, 10, 110, 0.2)) == pytest.approx(
            oracle(t, 0.9, 10, 110, 0.2), abs=1e-6
        )
    assert float(cubic_sparsity(5, 0.9, 5, 5)) == pytest.approx(0.9)


# --- while it trains --------------------------------------------------------------------------

PLAN = dict(begin=1, end=5, every=2, initial=0.2)


def expected(step: int) -> float:
    """Share of zeros after a step (from 0), pruned at 1, 3 and 5 of them."""
    last = max((t for t in (1, 3, 5) if t <= step), default=None)
    return 0.0 if last is None else float(cubic_sparsity(last, 0.6, 1, 5, 0.2))


def as_stored(kind: str) -> tuple[Any, Any]:
    params = {"w": weights()["head"]["kernel"]}
    if kind == "fp32":
        return params, get_precision("fp32")
    if kind == "fp8":
        return store_weights(params), get_precision("p=bf16,c=bf16,o=bf16", update="stochastic")
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    return params, get_precision("p=bf16,c=bf16,o=bf16", update=kind, moments="bf16")


@pytest.mark.parametrize("kind", ["fp32", "master", "stochastic", "fp8"])
def test_pruned_weights_are_exactly_zero_and_stay_so_in_every_storage(kind: str) -> None:
    params, precision = as_stored(kind)
    opt = wrap(pruned(optax.adamw(0.1, weight_decay=0.1), 0.6, **PLAN), precision, clip=1.0)
    state, step = opt.init(params), jax.jit(opt.step)
    gone = np.zeros((8, 16), bool)
    for number in range(9):
        grads = {"w": weights(number + 1)["head"]["kernel"]}
        params, state = step(grads, state, params)
        stored = params["w"].dequantize() if kind == "fp8" else params["w"]
        zero = np.asarray(stored.astype(jnp.float32)) == 0
        inner = state.inner if kind == "fp32" or kind == "fp8" else state.inner.inner
        dead = ~np.asarray(inner.masks["w"])
        assert (dead >= gone).all() and zero[dead].all()
        assert dead.sum() == round(expected(number) * 128)
        gone = dead
    assert 0.55 < gone.mean() < 0.65 and not zero[~gone].all()
    moments = np.asarray(inner.inner[0].mu["w"].astype(jnp.float32))
    assert np.abs(moments[~gone]).min() > 0


def test_what_is_pruned_is_the_smallest_of_the_updated_weights() -> None:
    params = {"w": weights()["head"]["kernel"]}
    opt = wrap(pruned(optax.sgd(0.5), 0.5), get_precision("fp32"))
    grads = {"w": weights(5)["head"]["kernel"]}
    new, state = jax.jit(opt.step)(grads, opt.init(params), params)
    updated = np.asarray(params["w"]) - 0.5 * np.asarray(grads["w"])
    limit = np.quantile(np.abs(updated), 0.5)
    np.testing.assert_allclose(new["w"], np.where(np.abs(updated) > limit, updated, 0), rtol=1e-6)
    assert int(state.inner.count) == 1


def test_a_skipped_step_moves_no_mask_and_no_count() -> None:
    params, precision = {"w": weights()["head"]["kernel"]}, get_precision("fp16")
    opt = wrap(pruned(optax.sgd(0.1), 0.5, begin=1, end=1), precision)
    state = opt.init(params)
    step = scaled_step(opt)
    params, state = step({"w": jnp.ones((8, 16))}, state, params)
    before = bits((params, state.inner))
    kept, skipped = step({"w": jnp.full((8, 16), jnp.nan)}, state, params)
    assert bits((kept, skipped.inner)) == before and int(skipped.gate.skipped) == 1
    pruned_now, after = step({"w": jnp.ones((8, 16))}, skipped, kept)
    assert float((pruned_now["w"] == 0).mean()) == 0.5 and int(after.inner.count) == 2


def test_masks_are_saved_with_the_run_and_cut_like_their_weights(tmp_path: Any) -> None:
    params = weights()
    opt = wrap(pruned(optax.adam(0.1), 0.5), get_precision("fp32"))
    state = init_state(params, opt)
    new, opt_state = jax.jit(opt.step)(params, state.opt_state, params)
    state = state._replace(params=new, opt_state=opt_state)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        back, _, _ = checkpoints.restore(jax.eval_shape(lambda: state))
    assert bits(back) == bits(state)
    assert back.opt_state.inner.masks["embed"]["table"].dtype == jnp.bool_
    axes = jax.tree.map(lambda w: (None,) * w.ndim, params)
    axes["embed"]["table"] = ("vocab", "embed")
    cut = state_shardings(state, axes, parse_mesh("fsdp=8"))
    mask, weight = cut.opt_state.inner.masks["embed"]["table"], cut.params["embed"]["table"]
    assert mask == weight and "fsdp" in str(mask.spec)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, ("sparsity=1.0", "write 0.5")),
        ({"sparsity": -0.1}, ("sparsity=-0.1",)),
        ({"scope": "leaf"}, ("'leaf'", "global layer")),
        ({"keep": "embed"}, ("one text", "list of patterns")),
        ({"keep": ["**/embd"]}, ("keep=**/embd", "near misses", "embed")),
        ({"keep": ["**"]}, ("no weight is left", "keep fewer")),
        ({"initial": 0.7}, ("initial=0.7 is above", "begin with less")),
        ({"begin": 3, "end": 2}, ("end=2", "3 or above")),
        ({"every": 0}, ("every=0", "1 or above")),
    ],
)
def test_what_is_wrong_is_one_line(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        pruned(optax.sgd(0.1), **({"sparsity": 0.5} | options)).init(weights())
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_kahan_is_refused_and_so_are_missing_params() -> None:
    kahan = get_precision("pure-bf16-kahan")
    with pytest.raises(ConfigError, match="update=kahan adds its compensation"):
        wrap(pruned(optax.sgd(0.1), 0.5), kahan)
    tx = pruned(optax.sgd(0.1), 0.5)
    with pytest.raises(ConfigError, match="params are missing"):
        tx.update(weights(), tx.init(weights()))
