"""Optimizers that read shapes: stacks of layers against plain optax on layers apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from mpjax.errors import ConfigError
from mpjax.models import decoder
from mpjax.optim import each_layer, wrap
from mpjax.optim.per_layer.layer_stacks import stacks
from mpjax.optim.per_layer.layer_view import LayerView
from mpjax.precision import matches
from tests.optim.scaled_step import scaled_step

LAYERS = {"encoder": 2, "decoder": 3}  # two stacks of unlike depth, as in a seq2seq


def drawn(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def half(count: int) -> dict[str, Any]:
        shapes = {"mlp": {"kernel": (count, 4, 6)}, "norm": {"scale": (count, 4)}}
        return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))

    def draw(shape: tuple[int, ...]) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    halves: dict[str, Any] = {name: {"layers": half(count)} for name, count in LAYERS.items()}
    halves["decoder"]["head"] = {"kernel": draw((4, 5)), "bias": draw((5,))}
    return halves


def unstacked(tree: Any) -> Any:
    """The oracle's tree: a list of layers, made by hand."""

    def half(name: str, parts: Any) -> Any:
        layers = [
            {"mlp": {"kernel": parts["layers"]["mlp"]["kernel"][i]},
             "norm": {"scale": parts["layers"]["norm"]["scale"][i]}}
            for i in range(LAYERS[name])
        ]  # fmt: skip
        return parts | {"layers": layers}

    return {name: half(name, parts) for name, parts in tree.items()}


def by_rank(params: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, params)


def rank_labels(params: Any) -> Any:
    return jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "vector", params)


EIGHT_BITS = "bf16 moments=int8@256"
GROUPS = {"matrix": optax.lamb(1e-2), "vector": optax.adam(1e-2)}
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "muon": (lambda: optax.contrib.muon(1e-2), "each"),
    "lamb": (lambda: optax.lamb(1e-2), "each"),
    "lars": (lambda: optax.lars(1e-2), "each"),
    "adafactor": (lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2), "each"),
    "sm3": (lambda: optax.sm3(1e-2), "each"),
    "novograd": (lambda: optax.novograd(1e-2), "each"),
    "centralised": (lambda: optax.chain(optax.centralize(), optax.sgd(0.1)), "each"),
    "agc": (lambda: optax.adaptive_grad_clip(0.1), "each"),
    "mask": (lambda: optax.adamw(1e-2, weight_decay=0.5, mask=by_rank), "each"),
    "labels": (lambda: optax.multi_transform(GROUPS, rank_labels), "each"),
    "steps of muon": (lambda: optax.MultiSteps(optax.contrib.muon(1e-2), 2), "each"),
    "clip, lamb": (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(1e-2)), "leaves"),
    "muon if finite": (lambda: optax.apply_if_finite(optax.contrib.muon(1e-2), 3), "leaves"),
    "lbfgs": (lambda: optax.lbfgs(1e-2, linesearch=None, memory_size=3), "leaves"),
    "clip, adam": (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), "whole"),
    "prodigy": (lambda: optax.contrib.prodigy(), "whole"),
    "mechanize": (lambda: optax.contrib.mechanize(optax.adam(1e-2)), "whole"),
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("fast_compile")


def _advance(tx: Any, tree: Any = lambda x: x) -> Any:
    """Weights after three steps of a transformation on `tree` of the stacks."""

    @jax.jit
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = tree(drawn())
        state = jax.jit(tx.init)(params)
        for seed in (1, 2, 3):
            params, state = step(params, state, tree(drawn(seed)))
    return params


@pytest.mark.parametrize("name", CASES)
def test_a_stack_is_its_layers(name: str) -> None:
    make, mode = CASES[name]
    tx = make()
    tx = tx if isinstance(tx, optax.GradientTransformation) else tx.gradient_transformation()
    view = LayerView(tx, ("**/layers",))
    found, right = _advance(view), _advance(tx, unstacked)
    assert view.plan(drawn(), {}).mode == mode
    for a, b in zip(jax.tree.leaves(unstacked(found)), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    # It can fail: on the stacks as they are, what reads shapes ends elsewhere.
    if mode == "each":
        gaps = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), _advance(tx), found)
        moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), found, drawn())
        assert max(jax.tree.leaves(gaps)) > 1e-2 * max(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", ["muon", "clip, lamb"])
def test_a_wrapped_optimizer_sees_layers(name: str) -> None:
    opt, params = wrap(CASES[name][0](), "fp32"), drawn()
    state, step = jax.jit(opt.init)(params), jax.jit(opt.step)
    for seed in (1, 2, 3):
        params, state = step(drawn(seed), state, params)
    right = _advance(CASES[name][0](), unstacked)
    for a, b in zip(jax.tree.leaves(unstacked(params)), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


ELEMENTWISE = {
    "adam": optax.adam(1e-3),
    "sgd": optax.sgd(1e-3, momentum=0.9, nesterov=True),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-3, centered=True),
    "schedule": optax.adamw(optax.cosine_decay_schedule(1e-3, 10)),
    "noise": optax.noisy_sgd(1e-3, key=0),
    "clip, adamw": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "if finite": optax.apply_if_finite(optax.adam(1e-3), 3),
    "schedule free": optax.contrib.schedule_free_adamw(1e-3),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_computes_number_by_number_keeps_its_program(name: str) -> None:
    tx, params = ELEMENTWISE[name], drawn()
    shown = each_layer(tx)

    def traced(tx: Any) -> tuple[str, str]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            state = tx.init(params)
            program = jax.make_jaxpr(lambda g, s, p: tx.update(g, s, p))(params, state, params)
        return str(program), str(jax.tree.structure(state))

    assert traced(shown) == traced(tx)


def names(path: Any) -> list[str]:
    return [key.key for key in path]  # as people write it: every key is a dict's


def by_name(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: names(path)[-1] == "kernel", params)


def by_rule(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: matches("**/layers/mlp", "/".join(names(path))), params
    )


def by_whole_path(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: names(path) == ["decoder", "layers", "mlp", "kernel"], params
    )


def by_structure(params: Any) -> Any:
    everywhere = jax.tree.map(lambda _: False, drawn())
    everywhere["decoder"]["layers"]["mlp"]["kernel"] = True
    return everywhere


DECAYED = {
    by_name: {"decoder/layers/mlp/kernel", "encoder/layers/mlp/kernel", "decoder/head/kernel"},
    by_rule: {"decoder/layers/mlp/kernel", "encoder/layers/mlp/kernel"},
    by_whole_path: {"decoder/layers/mlp/kernel"},
    by_structure: {"decoder/layers/mlp/kernel"},
}


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("mask", DECAYED, ids=lambda f: f.__name__)
def test_masks_by_path_mean_what_they_mean_on_the_stacked_tree(mask: Any, clipped: bool) -> None:
    decay = optax.add_decayed_weights(0.5, mask=mask)
    parts = (optax.scale_by_trust_ratio(), decay)
    tx = optax.chain(optax.clip_by_global_norm(1.0), *parts) if clipped else optax.chain(*parts)
    params = drawn()
    if clipped and mask is by_whole_path:  # no view of leaves has these paths
        with pytest.raises(ConfigError, match="a mask or label by path means other") as caught:
            each_layer(tx).init(params)
        assert "\n" not in str(caught.value)
        return
    shown = each_layer(tx)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = jax.jit(shown.init)(params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = jax.jit(shown.update)(zeros, state, params)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in jax.tree_util.tree_leaves_with_path(updates)
        if float(jnp.max(jnp.abs(x))) > 0
    }
    assert moved == DECAYED[mask]


def test_a_mask_as_a_tree_of_the_stacks_structure_fits() -> None:
    mask = by_structure(None)
    for parts in ((), (optax.clip_by_global_norm(1.0),)):
        tx = optax.chain(*parts, optax.lamb(1e-2, weight_decay=0.5, mask=mask))
        opt = wrap(tx, "fp32")
        state = jax.jit(opt.init)(drawn())
        new, _ = jax.jit(opt.step)(drawn(1), state, drawn())
        assert jax.tree.structure(new) == jax.tree.structure(drawn())


def test_layers_that_an_optimizer_tells_apart_are_refused() -> None:
    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "a" if "0" in names(path) else "b", params
        )

    groups = {"a": optax.set_to_zero(), "b": optax.lamb(1e-2)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(groups, labels))
    with pytest.raises(ConfigError) as caught:
        wrap(tx, "fp32").init(drawn())
    assert "\n" not in str(caught.value)


def test_where_layers_are_stacked() -> None:
    assert stacks(drawn()) == {("encoder", "layers"): 2, ("decoder", "layers"): 3}
    one = jnp.ones((4, 4))
    assert stacks({"layers": {"0": {"w": one}, "1": {"w": one}}}) == {}
    assert stacks({"layers": [{"w": one}]}) == {}
    assert stacks({"layers": {"w": one, "b": jnp.ones(3)}}) == {}
    assert stacks({"blocks": {"w": one}}) == {}
    assert stacks({"blocks": {"w": one}}, "**/blocks") == {("blocks",): 4}
    assert stacks({"layers": {"w": one}}, ()) == {}


def test_whose_stacks_have_another_name_says_it() -> None:
    params = {"blocks": {"w": jnp.ones((2, 3, 3))}}
    norms = {}
    for stacked in ("**/layers", "**/blocks", ()):
        opt = wrap(optax.contrib.muon(1.0), "fp32", stacked=stacked)
        state = opt.init(params)
        held = state.inner.inner_states["muon"].inner_state[0].mu["blocks"]["w"]
        norms[stacked] = getattr(held, "shape", None)
    assert norms == {"**/layers": None, "**/blocks": (2, 3, 3), (): None}


def test_muon_of_a_decoder_has_its_matrices() -> None:
    params = jax.eval_shape(decoder("tiny", "fp32", layers=2, width=16, heads=2).init,
                            jax.random.key(0))  # fmt: skip
    state = jax.eval_shape(wrap(optax.contrib.muon(1e-3), "fp32").init, params)
    groups = state.inner.inner_states

    def held(group: str) -> set[str]:
        mu = groups[group].inner_state[0].mu
        return {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(mu)
        }

    matrices = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in jax.tree_util.tree_leaves_with_path(params)
        if len(x.shape) - ("layers" in str(path)) == 2
    }
    assert held("muon") == matrices and any("layers" in path for path in matrices)
    assert (
        held("adam")
        == {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(params)
        }
        - matrices
    )


@pytest.mark.parametrize("text", ["pure-bf16-kahan", "O2", EIGHT_BITS])
@pytest.mark.parametrize("name", ["lamb", "clip, lamb"])
def test_a_skipped_step_leaves_all_bits(name: str, text: str) -> None:
    dtypes = {"pure-bf16-kahan": jnp.bfloat16, "O2": jnp.float16}
    params = jax.tree.map(lambda x: x.astype(dtypes.get(text, jnp.float32)), drawn())
    opt = wrap(CASES[name][0](), text)
    step = scaled_step(opt, donate_argnums=(1, 2))
    state = jax.jit(opt.init)(params)
    scale = state.loss_scale.value
    params, state = step(jax.tree.map(lambda g: g * scale, drawn(1)), state, params)
    before = jax.device_get((params, state.inner, state.update_state))
    params, state = step(jax.tree.map(lambda g: g * jnp.inf, drawn(1)), state, params)
    after = jax.device_get((params, state.inner, state.update_state))
    assert int(state.gate.skipped) == 1
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_low_moments_of_layers_are_stacked_too() -> None:
    opt = wrap(optax.lamb(1e-2), EIGHT_BITS)
    state = jax.eval_shape(opt.init, drawn())
    codes = state.inner.inner[0].mu["decoder"]["layers"]["mlp"]["kernel"].codes
    assert codes.shape == (3, 4, 6) and codes.dtype == jnp.uint8
