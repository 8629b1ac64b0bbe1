"""Several losses, each with its own scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

from mpjax.errors import ConfigError
from mpjax.optim import (
    DynamicLossScale,
    LeafLossScale,
    LogMaxLossScale,
    MultiLossScale,
    NoOpLossScale,
    StaticLossScale,
    scaled_value_and_grads,
    wrap,
)
from mpjax.precision import get_precision

pytestmark = pytest.mark.usefixtures("fast_compile")

W = jnp.ones(3, jnp.float16)
ODD = 1 + 2.0**-10  # all eleven bits of float16 are needed to hold it


def pair(w: Any) -> tuple[Any, Any]:
    """Gradients 2^-20 and 2^10, times ODD, of shared float16 weights."""
    small = jnp.sum((w * jnp.float16(ODD * 2.0**-10)).astype(jnp.float32)) * jnp.float32(2.0**-10)
    large = jnp.sum((w * jnp.float16(ODD * 2.0**10)).astype(jnp.float32))
    return small, large


def each(scales: Any, w: Any = W) -> list[Any]:
    """The gradient of each loss alone, by leaving the other out."""
    out = []
    for i, scale in enumerate(scales):
        fn = jax.jit(scaled_value_and_grads(lambda w, i=i: (pair(w)[i],)))
        out.append(fn(MultiLossScale([scale]), w)[1:])
    return out


def test_a_scale_for_each_loss_keeps_both_where_one_scale_loses_one() -> None:
    small, large = ODD * 2.0**-20, ODD * 2.0**10
    for power in range(-8, 24):  # the control: one scale for both
        (grads, ok), (others, fine) = each([StaticLossScale(2.0**power)] * 2)
        assert not (ok and fine and (grads == small).all() and (others == large).all())
    scales = [StaticLossScale(2.0**15), StaticLossScale(1.0)]
    fn = jax.jit(scaled_value_and_grads(pair))
    losses, grads, finite = fn(MultiLossScale(scales), W)
    (alone, _), (other, _) = each(scales)
    assert (alone == small).all() and (other == large).all()
    assert grads.dtype == jnp.float32 and np.array_equal(grads, np.full(3, small + large, "f4"))
    assert finite.tolist() == [True, True]
    assert [x.item() for x in losses] == [x.item() for x in jax.jit(pair)(W)]


def test_dynamic_scales_find_their_ways_apart() -> None:
    scale = MultiLossScale([DynamicLossScale(2.0**16)] * 2)
    fn = jax.jit(scaled_value_and_grads(pair))
    adjust = jax.jit(lambda scale, finite: scale.adjust(finite))
    skipped = 0
    for _ in range(20):
        _, _, finite = fn(scale, W)
        skipped += not finite.all()
        scale = adjust(scale, finite)
    assert scale.value.tolist() == [2.0**16, 2.0**5] and skipped == 11


@pytest.mark.parametrize("bad", [0, 1])
def test_a_loss_that_is_not_finite_adjusts_its_own_scale_alone(bad: int) -> None:
    def losses(w: Any, factor: Any) -> Any:
        hidden = jnp.tanh(w)  # shared
        return jnp.sum(hidden * factor[0]), jnp.sum(hidden * hidden * factor[1])

    factor = jnp.ones(2).at[bad].set(jnp.nan)
    fn = jax.jit(scaled_value_and_grads(losses))
    scale = MultiLossScale([DynamicLossScale(64.0), DynamicLossScale(64.0)])
    _, grads, finite = fn(scale, jnp.ones(3), factor)
    assert finite.tolist() == [i != bad for i in range(2)] and not jnp.isfinite(grads).any()
    assert scale.adjust(finite).value.tolist() == [64.0 - 32 * (i == bad) for i in range(2)]


def test_the_gate_of_wrap_skips_the_whole_step() -> None:
    opt = wrap(optax.adam(0.1), get_precision("fp32"))
    params = {"w": jnp.ones(3)}
    state = opt.init(params)
    fn = jax.jit(scaled_value_and_grads(lambda p, f: (jnp.sum(p["w"]), jnp.sum(p["w"]) * f)))
    scale = MultiLossScale([DynamicLossScale(8.0), DynamicLossScale(8.0)])
    for factor, moved in ((jnp.inf, False), (1.0, True)):
        _, grads, finite = fn(scale, params, jnp.float32(factor))
        after, new = opt.step(grads, state, params)
        assert bool((after["w"] != params["w"]).all()) is moved
        assert bool(finite.all()) is moved and int(new.gate.skipped) == (not moved)
        assert moved or jax.tree.all(jax.tree.map(np.array_equal, new.inner, state.inner))


def test_aux_and_trees_pass_and_the_sum_is_the_plain_gradient() -> None:
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for k in "ab"}
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)

    def losses(p: Any, x: Any) -> Any:
        y = jnp.tanh(x @ p["a"])
        return (jnp.mean(y), jnp.mean((y @ p["b"]) ** 2)), {"y": y}

    fn = jax.jit(scaled_value_and_grads(losses, has_aux=True))
    scale = MultiLossScale([StaticLossScale(64.0), NoOpLossScale()])
    (values, aux), grads, finite = fn(scale, params, x)
    expected = jax.jit(jax.grad(lambda p: sum(losses(p, x)[0])))(params)
    for name in "ab":
        np.testing.assert_allclose(grads[name], expected[name], rtol=1e-5, atol=1e-7)
    assert len(values) == 2 and aux["y"].shape == (5, 4) and finite.shape == (2,)
    doubled = fn(MultiLossScale([StaticLossScale(64.0), StaticLossScale(2.0)]), params, x)[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, doubled, grads))


def test_the_forward_pass_that_losses_share_is_computed_once() -> None:
    def losses(w: Any) -> Any:
        y = jnp.tanh(w @ w)
        return jnp.sum(y), jnp.sum(y * y)

    scale = MultiLossScale([StaticLossScale(2.0)] * 2)
    lowered = jax.jit(scaled_value_and_grads(losses)).lower(scale, jnp.ones((8, 8)))
    assert lowered.as_text().count("stablehlo.dot_general") == 6
    text = lowered.compile().as_text()
    assert text.count(" dot(") + text.count("__onednn") == 5  # forward once, backward 2 x 2


def test_it_is_a_pytree_of_its_scales(tmp_path: Path) -> None:
    scale = MultiLossScale([DynamicLossScale(2.0**9, min_scale=0.25)] * 2)
    scale = scale.adjust(jnp.array([True, False]))
    out = jax.jit(lambda s: s)(scale)
    assert out.scales[1].settings.min_scale == 0.25 and out.value.tolist() == [512.0, 256.0]
    specs = jax.tree.map(lambda _: PartitionSpec(), scale)
    assert len(jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))) == 6
    donated = jax.jit(lambda s: s, donate_argnums=0)(MultiLossScale([DynamicLossScale()] * 2))
    assert donated.value.tolist() == [2.0**16] * 2
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "scale", {"scale": scale})
        checkpointer.wait_until_finished()
        fresh = MultiLossScale([DynamicLossScale(2.0**9, min_scale=0.25)] * 2)
        back = checkpointer.restore(tmp_path / "scale", jax.eval_shape(lambda: {"scale": fresh}))
    assert back["scale"].value.tolist() == [512.0, 256.0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="no scale for any loss"):
        MultiLossScale([])
    for scale in (LogMaxLossScale(), LeafLossScale(["**"])):
        with pytest.raises(ConfigError, match="reads the gradients of one loss"):
            MultiLossScale([scale])
    fn = scaled_value_and_grads(pair)
    with pytest.raises(ConfigError, match="returns 2 losses and there are 1 scales"):
        fn(MultiLossScale([StaticLossScale(1.0)]), W)
    with pytest.raises(ConfigError, match="returns no tuple of losses"):
        scaled_value_and_grads(jnp.sum)(MultiLossScale([StaticLossScale(1.0)]), W)
    with pytest.raises(ConfigError, match="a Precision trains one loss"):
        get_precision("fp16", loss_scale=MultiLossScale([StaticLossScale(1.0)]))
