"""One parameter tree and one function, however the layers are run and whatever the Precision."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models import Decoder, decoder
from mpjax.precision import get_precision
from tests.models.shapes import FAST, SIZE, loss_and_gradients, small

pytestmark = pytest.mark.usefixtures("fast_compile")

# Differs from the other layers in a field that no operation reads: a segment of its own, with
# equal numbers.
SPLIT = get_precision(
    "fp32", rules=["decoder/layers/1/attention/softmax=p=bf16,c=f32,o=f32"], update="master"
)
VARIANTS: dict[str, dict[str, Any]] = {
    "unroll": dict(loop="unroll"),
    "unroll-full": dict(loop="unroll", remat="full"),
    "scan-full": dict(loop="scan", remat="full"),
    "scan-dots": dict(loop="scan", remat="dots"),
    "scan-dots_no_batch": dict(loop="scan", remat="dots_no_batch"),
    "scan-segments": dict(loop="scan", precision=SPLIT),
    "unroll-segments-full": dict(loop="unroll", precision=SPLIT, remat="full"),
    "chunked-loss": dict(loop="scan", loss_chunk=2),
}


def _init(model: Decoder) -> Any:
    return jax.jit(model.init, compiler_options=FAST)(jax.random.key(3))


def _bits(tree: Any) -> dict[str, bytes]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes() + str(leaf.shape).encode()
        for path, leaf in leaves
    }


@pytest.fixture(scope="module")
def canonical() -> Any:
    return _init(small(layers=3))


@pytest.mark.parametrize(
    "variant",
    [
        dict(precision="bf16"),
        dict(precision="low-fp16"),
        dict(precision=SPLIT),
        dict(precision=get_precision("bf16", rules=["decoder/layers/0=fp32"])),
        *VARIANTS.values(),
    ],
    ids=["bf16", "low-fp16", "split", "layer-0", *VARIANTS],
)
def test_the_tree_does_not_depend_on_how_it_is_run(variant: dict[str, Any], canonical: Any) -> None:
    assert _bits(_init(small(layers=3, **variant))) == _bits(canonical)


def test_low_weights_are_the_same_draw_rounded(canonical: Any) -> None:
    low = _init(small("pure-bf16", layers=3))
    assert _bits(low) == _bits(jax.tree.map(lambda x: x.astype(jnp.bfloat16), canonical))


def test_layers_are_drawn_apart_and_do_not_depend_on_the_depth(canonical: Any) -> None:
    deeper = _init(small(layers=5))
    query = [
        tree["decoder"]["layers"]["attention"]["query"]["kernel"] for tree in (canonical, deeper)
    ]
    assert not np.array_equal(query[0][0], query[0][1])
    np.testing.assert_array_equal(np.asarray(query[0]), np.asarray(query[1][:3]))


def test_initial_weights_have_the_stated_deviation() -> None:
    model = decoder("tiny", layers=2, width=64, heads=4)
    layers = _init(model)["decoder"]["layers"]
    gain = (2 * 2) ** -0.5
    for weight, deviation in (
        (layers["attention"]["query"]["kernel"], 64**-0.5),
        (layers["attention"]["out"]["kernel"], gain * 64**-0.5),
        (layers["mlp"]["down"]["kernel"], gain * model.config.hidden**-0.5),
    ):
        assert float(jnp.std(weight)) == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_of_running_layers_is_one_function(variant: str) -> None:
    want, want_grads = loss_and_gradients(small(layers=3, loop="scan"))
    model = small(layers=3, **VARIANTS[variant])
    assert len(model.segments) == (3 if "segments" in variant else 1)
    loss, grads = loss_and_gradients(model)
    assert float(loss) == pytest.approx(float(want), rel=1e-6)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=2e-6 * scale)


def test_remat_recomputes() -> None:
    def products(**changes: Any) -> int:
        model = small(layers=2, loop="unroll", **changes)
        params = jax.eval_shape(model.init, jax.random.key(0))
        ids = jnp.zeros((1, 4), jnp.int32)
        loss = jax.grad(lambda p: model.loss(p, {"inputs": ids, "targets": ids})[0])
        return jax.jit(loss).lower(params).as_text().count("dot_general")

    none, dots = products(), products(remat="dots")
    assert none == dots < products(remat="dots_no_batch") < products(remat="full")


@pytest.mark.parametrize(
    ("layers", "rules", "segments"),
    [
        (4, [], [(0, 4)]),
        (4, ["decoder/layers/0=fp32"], [(0, 1), (1, 4)]),
        (4, ["decoder/layers/3/mlp=fp32"], [(0, 3), (3, 4)]),
        (4, ["decoder/layers/0=fp32", "decoder/layers/3/mlp=fp32"], [(0, 1), (1, 3), (3, 4)]),
        (4, ["decoder/layers/*/mlp=fp32"], [(0, 4)]),
        (4, ["decoder/layers/1=fp32", "decoder/layers/2=fp32"], [(0, 1), (1, 3), (3, 4)]),
        (12, ["decoder/layers/1=fp32"], [(0, 1), (1, 2), (2, 12)]),  # 1 is not 10 or 11
        (12, ["decoder/layers/1?=fp32"], [(0, 10), (10, 12)]),
    ],
)
def test_segments(layers: int, rules: list[str], segments: list[tuple[int, int]]) -> None:
    precision = get_precision("bf16", rules=rules)
    assert list(decoder("tiny", precision, **(SIZE | {"layers": layers})).segments) == segments


def test_layers_stored_in_different_dtypes_are_refused() -> None:
    precision = get_precision("fp32", rules=["decoder/layers/1/mlp=bfloat16"], update="master")
    with pytest.raises(
        ConfigError, match="layers/1/mlp/.*: stored in bf16, layer 0 in f32; layers"
    ):
        small(precision)
    small(get_precision("fp32", rules=["decoder/layers/mlp=bfloat16"], update="master"))


def test_rules_are_checked_against_the_model() -> None:
    with pytest.raises(ConfigError, match="layers/2/mlp.* matches no path"):
        small(get_precision("bf16", rules=["decoder/layers/2/mlp=fp32"]))
    with pytest.raises(ConfigError, match="norm_query.*matches no path"):
        small(get_precision("bf16", rules=["**/norm_query=fp32"]))
    small(get_precision("bf16", rules=["**/norm_query=fp32"]), qk_norm=True)


def test_every_parameter_has_logical_axes() -> None:
    for kind in ("gpt", "llama"):
        model = small(kind=kind)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
        named = jax.tree.map(
            lambda axes, leaf: len(axes) == leaf.ndim, model.axes, shapes, is_leaf=is_axes
        )
        assert all(jax.tree.leaves(named))
        assert model.axes["decoder"]["layers"]["mlp"]["down"]["kernel"] == (
            "layers",
            "mlp",
            "embed",
        )
