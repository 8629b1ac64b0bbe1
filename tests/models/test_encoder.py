"""The encoder against BERT in numpy; padding, heads, policies and training."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.models import Encoder, encoder
from mpjax.precision import get_precision
from mpjax.train import build
from tests.models import encoder_oracle
from tests.models.shapes import FAST, IDS, stirred
from tests.ops.jaxprs import dtypes, equations

pytestmark = pytest.mark.usefixtures("fast_compile")

T = IDS.shape[1]
TYPES = jnp.asarray(np.arange(T)[None] > 4, jnp.int32).repeat(2, 0)
KEEP = jnp.asarray(np.arange(T)[None] < np.array([[T], [5]]))
FULL = {"ids": IDS, "types": TYPES}


def small(precision: Any = "fp32", **changes: Any) -> Encoder:
    """An encoder of two layers of width 16."""
    size = dict(vocabulary=32, layers=2, width=16, heads=4, context=16)
    return encoder("bert-tiny", precision, **(size | changes))


def outputs(model: Encoder, params: Any, inputs: Any) -> dict[str, np.ndarray]:
    run = jax.jit(lambda p, i: model.apply(p, i)[0], compiler_options=FAST)
    return {name: np.asarray(y, np.float32) for name, y in run(params, inputs).items()}


@pytest.mark.parametrize("head", ["pretrain", "class", "token"])
def test_outputs_against_numpy(head: str) -> None:
    model = small(head=head, classes=3, layers=2 if head == "pretrain" else 1)
    params = stirred(model)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rows = zip(np.asarray(IDS), np.asarray(TYPES), strict=True)
    want = [encoder_oracle.outputs(model.config, exact, *row) for row in rows]
    got = outputs(model, params, FULL)
    assert set(got) == set(want[0])
    for name, y in got.items():
        one = np.stack([w[name] for w in want])
        np.testing.assert_allclose(y, one, rtol=0, atol=1e-5 * np.abs(one).max(), err_msg=name)


@pytest.mark.parametrize(
    ("size", "count"),
    [("bert-base", 109_482_240), ("bert-large", 335_141_888), ("minilm-l6", 22_713_216)],
)
def test_published_parameter_counts(size: str, count: int) -> None:
    params = jax.eval_shape(encoder(size).init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


def test_padding_changes_nothing_but_itself() -> None:
    model = small(head="token")
    params = stirred(model)
    alone = outputs(model, params, IDS[1:, :5])["token"][0]
    kept = outputs(model, params, {"ids": IDS, "keep": KEEP})["token"]
    np.testing.assert_allclose(kept[1, :5], alone, rtol=0, atol=1e-6 * np.abs(alone).max())
    np.testing.assert_array_equal(kept[0], outputs(model, params, {"ids": IDS})["token"][0])
    seen = outputs(model, params, {"ids": IDS})["token"][1, :5]  # the control
    assert np.abs(seen - alone).max() > 1e-2


def test_each_token_sees_the_ones_behind_it_and_the_type_counts() -> None:
    model = small()
    params = stirred(model)
    a = outputs(model, params, IDS)["features"]
    b = outputs(model, params, IDS.at[:, -1].set(31))["features"]
    assert np.abs(a[:, 0] - b[:, 0]).max() > 1e-3
    assert np.abs(a - outputs(model, params, FULL)["features"])[:, :4].max() > 1e-3


@pytest.mark.parametrize("changes", [dict(loop="scan"), dict(loop="scan", remat="full")])
def test_how_the_layers_are_run_does_not_matter(changes: dict[str, Any]) -> None:
    model, other = small(loop="unroll", dropout=0.3), small(dropout=0.3, **changes)
    params, key = stirred(model), jax.random.key(5)

    def gradient(m: Encoder) -> Any:
        loss = lambda p: jnp.sum(jnp.sin(m.apply(p, FULL, key=key, train=True)[0]["pooled"]))  # noqa: E731
        return jax.jit(jax.grad(loss), compiler_options=FAST)(params)

    a, b = gradient(model), gradient(other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), a, b)
    assert all(float(jnp.max(jnp.abs(x))) > 0 for x in jax.tree.leaves(a))


@pytest.mark.parametrize(
    ("path", "primitive"),
    [
        ("encoder/layers/0/attention/softmax", "exp"),
        ("encoder/layers/0/norm_mlp", "rsqrt"),
        ("encoder/norm_embed", "rsqrt"),
        ("encoder/masked/norm", "rsqrt"),
        ("encoder/layers/mlp/activation", "erfc"),
        ("encoder/masked/activation", "erfc"),
        ("encoder/pooler/activation", "tanh"),
        ("encoder/pooler/dense", "dot_general"),
        ("encoder/masked/head", "dot_general"),
        ("encoder/next/head", "dot_general"),
    ],
)
def test_a_rule_on_a_path_acts_there(path: str, primitive: str) -> None:
    def found(precision: Any) -> set[str]:
        model = small(precision, head="pretrain", layers=1)
        params = jax.eval_shape(model.init, jax.random.key(0))
        outs = (lambda p: model.apply(p, FULL)[0]), params
        if primitive != "dot_general":
            return dtypes(primitive, *outs)
        dots = [e for e in equations(*outs) if e.primitive.name == primitive]
        return {v.aval.dtype.name for e in dots for v in e.invars}

    assert "float16" not in found("bf16")
    assert "float16" in found(get_precision("bf16", rules=[f"{path}=p=f32,c=f16,o=bf16"]))


def test_mixed_presets_give_logits_in_float32() -> None:
    model = small("bf16", head="pretrain")
    params = jax.eval_shape(model.init, jax.random.key(0))
    outs = jax.eval_shape(model.apply, params, IDS)[0]
    found = {name: y.dtype.name for name, y in outs.items()}
    assert found == {
        "features": "bfloat16", "pooled": "bfloat16", "masked": "float32", "next": "float32"
    }  # fmt: skip


@pytest.mark.parametrize("precision", ["fp8-delayed", "pure-bf16-sr"])
def test_it_trains_under_recipes_and_low_storage(precision: str) -> None:
    model = small(precision, head="class", layers=1, dropout=0.1)

    def objective(model: Encoder) -> Any:
        def loss(params: Any, batch: Any, *, state: Any, key: Any, train: bool) -> Any:
            out, state = model.apply(params, batch["ids"], state=state, key=key, train=train)
            picked = jax.nn.log_softmax(out["class"].astype(jnp.float32))[:, 0]
            return -jnp.mean(picked), state

        return loss

    state, step = build(model, optax.sgd(0.1), objective=objective)
    before = jax.tree.map(np.asarray, state.params["encoder"]["pooler"])
    batch, losses = {"ids": IDS}, []
    for _ in range(4):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    after = state.params["encoder"]["pooler"]
    assert not np.array_equal(np.asarray(after["dense"]["kernel"]), before["dense"]["kernel"])
    if precision == "fp8-delayed":
        amax = state.model_state["amax"]
        assert set(amax) == {"layers", "pooler"}
        assert float(jnp.max(amax["pooler"]["dense"]["kernel"].amax)) > 0


def test_every_parameter_has_logical_axes() -> None:
    model = small(head="pretrain")
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    fits = lambda axes, leaf: len(axes) == leaf.ndim  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(fits, model.axes, shapes, is_leaf=is_axes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "mlm"}, "head='mlm' is unknown; known: none masked pretrain class token"),
        ({"head": "class", "classes": 1}, "head='class' needs at least 2 classes, classes=1"),
        ({"types": -1}, "types=-1 must not be negative"),
        ({"clases": 3}, "unknown field 'clases'; did you mean classes"),
    ],
    ids=["head", "classes", "types", "field"],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tokens": IDS}, "the input lacks 'ids'"),
        ({"ids": IDS, "mask": KEEP}, "the input holds 'mask'; give ids, and keep and types"),
        ({"ids": IDS, "keep": KEEP[:, :4]}, r"keep has shape \(2, 4\), ids \(2, 9\)"),
        ({"ids": IDS.repeat(2, 1)}, "sequence of 18 tokens is longer than context=16"),
    ],
    ids=["ids", "mask", "shape", "long"],
)
def test_bad_inputs_are_named(inputs: Any, message: str) -> None:
    model = small()
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(lambda p: model.apply(p, inputs), params)
    if "keep" not in inputs:
        return
    with pytest.raises(ConfigError, match="token types are given and types=0"):
        jax.eval_shape(lambda p: small(types=0).apply(p, FULL), params)
