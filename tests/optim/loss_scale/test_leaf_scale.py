"""A scale a group of weights: what it saves, what it cannot, and that groups do not mix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import quantize
from mpjax.models import decoder
from mpjax.optim import (
    DynamicLossScale,
    LeafLossScale,
    ScaledGradients,
    StaticLossScale,
    make_loss_scale,
    scale_gradient,
    scaled_grad,
    scaled_value_and_grad,
    wrap,
)
from mpjax.precision import LossScaleSettings, get_precision
from mpjax.train import build

pytestmark = pytest.mark.usefixtures("fast_compile")

SMALL, LARGE = 2.0**-30, 2.0**10  # gradients of "small" and of "large": 40 binades, float16 has 40
PARAMS = {"large": jnp.ones(3, jnp.float16), "small": jnp.ones(3, jnp.float16)}


def two(params: Any) -> Any:
    """Both gradients leave in float16, with three significant bits each."""
    small = jnp.sum((params["small"] * jnp.float16(1.75 * 2.0**-10)).astype(jnp.float32))
    large = jnp.sum((params["large"] * jnp.float16(1.75 * 2.0**10)).astype(jnp.float32))
    return small * jnp.float32(2.0**-20) + large


def both_right(grads: Any) -> bool:
    return bool(jnp.all(grads["small"] == 1.75 * SMALL) and jnp.all(grads["large"] == 1.75 * LARGE))


def test_it_serves_two_groups_that_no_single_scale_serves() -> None:
    fn = jax.jit(scaled_value_and_grad(two))
    good, lost, over = [], [], []
    for power in range(-20, 30):
        _, grads, finite = fn(StaticLossScale(2.0**power), PARAMS)
        good.append(bool(finite) and both_right(grads))
        over.append(not finite)
        lost.append(bool(jnp.any(grads["small"] != 1.75 * SMALL)))
    assert not any(good)  # the control
    assert any(lost) and any(over) and all(a or b for a, b in zip(lost, over, strict=True))
    scale = LeafLossScale(["small", "large"], init=2.0**16, max_scale=2.0**20)
    adjust = jax.jit(lambda scale, finite, grads: scale.adjust(finite, grads))
    for _ in range(20):
        loss, grads, finite = fn(scale, PARAMS)
        if finite:
            break
        scale = adjust(scale, finite, grads)
    assert bool(finite) and both_right(grads)
    assert grads["small"].dtype == jnp.float32 and loss == two(PARAMS)
    assert scale.at("small") == 2.0**16 and scale.at("large") == 2.0**5
    assert scale.value == 2.0**5


def test_gradients_equal_plain_ones_where_nothing_is_lost() -> None:
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=(4, 4)), jnp.float32) for k in "abc"}
    x = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)

    def loss(p: Any, x: Any) -> Any:
        return jnp.mean(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"])

    fn = jax.jit(scaled_value_and_grad(lambda p, x: (loss(p, x), x), has_aux=True))
    (value, aux), grads, finite = fn(LeafLossScale(["b", "**"], init=2.0**9), params, x)
    expected = jax.jit(jax.grad(loss))(params, x)
    assert jax.tree.all(jax.tree.map(np.array_equal, grads, expected)) and bool(finite)
    assert value == jax.jit(loss)(params, x) and np.array_equal(aux, x)


@pytest.mark.parametrize("bad", ["small", "large"])
def test_each_group_adjusts_by_its_own_finiteness(bad: str) -> None:
    scale = LeafLossScale(["small", "large"], init=64.0, growth_interval=2)
    grads = {"small": jnp.ones(2), "large": jnp.ones(2)}
    scale = scale.adjust(jnp.bool_(True), grads)
    broken = grads | {bad: jnp.array([1.0, jnp.nan])}
    other = "large" if bad == "small" else "small"
    after = scale.adjust(jnp.bool_(False), broken)
    assert after.at(bad) == 32.0 and after.at(other) == 128.0
    # not finite elsewhere: nobody's own fault
    after = scale.adjust(jnp.bool_(False), grads)
    assert after.at(bad) == 32.0 and after.at(other) == 32.0


def test_each_group_moves_as_a_dynamic_scale_of_its_own() -> None:
    fields = dict(init=2.0**6, growth_interval=3, hysteresis=2, min_scale=2.0, max_scale=2.0**8)
    flags = np.random.default_rng(1).random((400, 2)) > 0.25
    leaf = LeafLossScale(["a", "b"], **fields)  # type: ignore[arg-type]
    alone = [DynamicLossScale(**fields) for _ in range(2)]  # type: ignore[arg-type]
    step = jax.jit(lambda s, f, g: s.adjust(f, g))
    single = jax.jit(lambda s, f: s.adjust(f))
    for flag in flags:
        grads = {k: jnp.where(flag[i], jnp.ones(1), jnp.inf) for i, k in enumerate("ab")}
        leaf = step(leaf, jnp.bool_(flag.all()), grads)
        alone = [single(s, jnp.bool_(flag[i])) for i, s in enumerate(alone)]
        for ours, theirs in zip(
            leaf.state, zip(*(s.state for s in alone), strict=True), strict=True
        ):
            assert ours.tolist() == [x.item() for x in theirs]
    assert len({s.value.item() for s in alone}) == 2 or leaf.state[0][0] == leaf.state[0][1]


def test_stuck_is_the_group_that_cannot_fall() -> None:
    scale = LeafLossScale(["a", "b"], init=1.0, min_scale=1.0)
    scale = scale.adjust(jnp.bool_(True), {"a": jnp.ones(1), "b": jnp.ones(1)})
    raised = jax.tree.unflatten(
        jax.tree.structure(scale), (jnp.array([1.0, 8.0]), *scale.state[1:])
    )
    nan, one = jnp.array([jnp.nan]), jnp.ones(1)
    assert bool(raised.at_minimum({"a": nan, "b": one}))
    assert not bool(raised.at_minimum({"a": one, "b": nan}))
    assert not bool(raised.at_minimum()) and bool(scale.at_minimum())


# --- markers -------------------------------------------------------------------------------------


def test_a_marker_is_the_identity_and_scales_the_cotangent() -> None:
    x = {"a": jnp.arange(3.0), "b": jnp.ones(2, jnp.float16)}
    out = scale_gradient(x, 2.0**20)
    assert jax.tree.all(jax.tree.map(np.array_equal, out, x))
    tiny = jnp.float16(2.0**-20)

    def loss(b: Any) -> Any:
        return jnp.sum(scale_gradient(b, jnp.float32(2.0**20)) * tiny)

    grad = jax.grad(loss)(x["b"])  # the factor itself is beyond float16
    assert grad.dtype == jnp.float16 and grad.tolist() == [1.0, 1.0]
    assert jax.grad(lambda s: jnp.sum(scale_gradient(jnp.ones(2), s)))(jnp.float32(3.0)) == 0


def segments(scales: Any) -> Any:
    """Two float16 layers; the first one's weight gradient is 2^-26, from a cotangent of 2^-13."""

    def loss(params: Any) -> Any:
        x = jnp.full(3, 2.0**-13, jnp.float16)
        inner = params["first"] * scale_gradient(x, 1 / scales["first"])
        y = scale_gradient(inner, scales["first"])
        return jnp.sum((y * jnp.float16(2.0**-13)).astype(jnp.float32))

    return loss


def test_markers_save_a_weight_gradient_in_one_pass() -> None:
    params = {"first": jnp.ones(3, jnp.float16)}
    scale = LeafLossScale(["first"], init=2.0**8)
    lost = jax.jit(jax.grad(segments({"first": jnp.float32(1.0)})))(params)
    assert (lost["first"] == 0).all()  # the control: 2^-26 is below float16
    grads = jax.jit(lambda p, s: jax.grad(segments({"first": s.at("first")}))(p))(params, scale)
    assert scale.unscale(grads)["first"].tolist() == [2.0**-26] * 3


def test_a_marker_cannot_restore_what_underflowed_before_it() -> None:
    """The limit: cotangents that are zero stay zero; a pull at the group's own scale has them."""

    def loss(params: Any, marker: float = 1.0) -> Any:
        y = scale_gradient(params["w"] * jnp.float16(1.0), marker)
        return jnp.sum((y * jnp.float16(2.0**-14)).astype(jnp.float32)) * jnp.float32(2.0**-14)

    params = {"w": jnp.ones(2, jnp.float16)}
    marked = jax.grad(lambda p: loss(p, 2.0**16))(params)
    assert (marked["w"] == 0).all()
    _, grads, _ = scaled_value_and_grad(loss)(LeafLossScale(["w"], init=2.0**16), params)
    assert grads["w"].tolist() == [2.0**-28] * 2


# --- in the optimizer, the Precision and the train step ------------------------------------------


def test_the_train_step_takes_it_without_a_change_to_the_model() -> None:
    def run(loss_scale: str, mesh: str | None = None, accumulate: int = 1) -> Any:
        precision = get_precision("fp32", loss_scale=loss_scale)
        model = decoder(
            "tiny", precision, vocabulary=64, layers=1, width=32, heads=8, context=16, loop="unroll"
        )
        state, step = build(model, optax.sgd(0.5), mesh, accumulate=accumulate)
        ids = np.random.default_rng(0).integers(0, 64, (16, 9)).astype(np.int32)
        batch = {"inputs": jnp.asarray(ids[:, :-1]), "targets": jnp.asarray(ids[:, 1:])}
        state, metrics = step(state, batch)
        return jax.tree.map(np.asarray, state.params), {k: float(v) for k, v in metrics.items()}

    text = "leaf:init=1024,groups=decoder/embed|**"
    plain, _ = run("none")
    leaf, metrics = run(text)
    assert metrics["loss_scale"] == metrics["loss_scale/decoder/embed"] == 1024.0
    same = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-5, atol=1e-6), plain, leaf)
    assert jax.tree.all(same)  # a power of two changes no product; XLA's order of sums may
    for options in ({"mesh": "data=2,fsdp=2,tensor=2"}, {"accumulate": 2}):
        other, _ = run(text, **options)  # type: ignore[arg-type]
        same = jax.tree.map(lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-5), plain, other)
        assert jax.tree.all(same)


def test_one_bad_group_skips_the_whole_step_and_lowers_its_own_scale() -> None:
    precision = get_precision("fp16", loss_scale="leaf:init=64,growth=4,interval=1")
    params = {"a": jnp.ones(2), "b": {"w": jnp.ones(2)}}
    opt = wrap(optax.adam(0.1), precision)
    state = opt.init(params)
    assert state.loss_scale.settings.groups == ("a", "b/w")  # one a leaf
    bad = {"a": jnp.ones(2), "b": {"w": jnp.array([jnp.inf, 1.0])}}
    after, new = jax.jit(opt.step)(ScaledGradients(bad), state, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, after, params))
    assert jax.tree.all(jax.tree.map(np.array_equal, new.inner, state.inner))
    assert new.loss_scale.state[0].tolist() == [256.0, 32.0]
    assert new.gate.skipped == 1 and new.gate.bad_leaf == 1


def test_weights_in_fp8_are_groups_like_others() -> None:
    w = {"w": quantize(jnp.ones((2, 4)), "e4m3", "row", scale_rounding="up")}
    precision = get_precision("fp32", loss_scale="leaf", update="nearest")
    opt = wrap(optax.sgd(0.5), precision)
    state = opt.init(w)
    scaled = ScaledGradients({"w": jnp.full((2, 4), float(state.loss_scale.at("w")))})
    assert opt.step(scaled, state, w)[0]["w"].dequantize().tolist() == [[0.5] * 4] * 2


# --- what is refused -----------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    scale = LeafLossScale(["a"])
    with pytest.raises(ConfigError, match="b: no group of the loss scale covers this weight"):
        scale.unscale({"a": jnp.ones(1), "b": jnp.ones(1)})
    with pytest.raises(ConfigError, match="the group 'a' has no weight .*weights are b"):
        LeafLossScale(["a", "**"]).unscale({"b": jnp.ones(1)})
    with pytest.raises(ConfigError, match="leaf scales each group's gradients, not the loss"):
        scale.scale(jnp.float32(1.0))
    with pytest.raises(ConfigError, match="leaf reads the gradients"):
        scale.adjust(jnp.bool_(True))
    with pytest.raises(ConfigError, match="no group 'b'; there are a"):
        scale.at("b")
    with pytest.raises(ConfigError, match="leaf has no groups"):
        LeafLossScale([])
    with pytest.raises(ConfigError, match=r"write\s+make_loss_scale\(settings, params\)"):
        make_loss_scale(LossScaleSettings("leaf"))
    with pytest.raises(ConfigError, match="the group 'x' has no weight"):
        make_loss_scale(LossScaleSettings("leaf", groups=("x", "**")), {"a": jnp.ones(1)})


def test_delayed_scaling_and_a_leaf_scale_are_refused_together() -> None:
    """The amax of gradients leaves as the cotangent of a second argument, at one scale."""

    def fn(params: Any, seen: Any) -> Any:
        return jnp.sum(params["a"]) + sum(jnp.sum(x) for x in seen), None

    params, scale = {"a": jnp.ones(1)}, LeafLossScale(["a"], init=8.0)
    (grads, rest), _ = scaled_grad(scale, fn, argnums=(0, 1))(params, [])
    assert grads["a"].tolist() == [8.0] and rest == []
    with pytest.raises(ConfigError, match="leaf pulls gradients at several scales"):
        scaled_grad(scale, fn, argnums=(0, 1))(params, [jnp.zeros(3)])
