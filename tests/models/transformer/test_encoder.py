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
from mpjax.optim import wrap
from mpjax.precision import get_precision
from mpjax.train import init_state, make_train_step
from tests.models.shapes import IDS, applied, drawn
from tests.models.transformer import encoder_oracle
from tests.ops.jaxprs import equations

pytestmark = pytest.mark.usefixtures("fast_compile")

T = IDS.shape[1]
TYPES = jnp.asarray(np.arange(T)[None] > 4, jnp.int32).repeat(2, 0)
KEEP = jnp.asarray(np.arange(T)[None] < np.array([[T], [5]]))
FULL = {"ids": IDS, "types": TYPES}


def small(precision: Any = "fp32", **changes: Any) -> Encoder:
    """An encoder of two layers of width 16."""
    size = dict(vocabulary=32, layers=2, width=16, heads=4, context=16, loop="scan")
    return encoder("bert-tiny", precision, **(size | changes))


def outputs(model: Encoder, params: Any, inputs: Any) -> dict[str, np.ndarray]:
    found = applied(model)(params, inputs)[0]
    return {name: np.asarray(y, np.float32) for name, y in found.items()}


@pytest.mark.parametrize("head", ["pretrain", "token"])
def test_outputs_against_numpy(head: str) -> None:
    model = small(head=head, classes=3, layers=2 if head == "pretrain" else 1)
    params = drawn(model)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    rows = zip(np.asarray(IDS), np.asarray(TYPES), strict=True)
    want = [encoder_oracle.outputs(model.config, exact, *row) for row in rows]
    got = outputs(model, params, FULL)
    assert set(got) == set(want[0])
    for name, y in got.items():
        one = np.stack([w[name] for w in want])
        np.testing.assert_allclose(y, one, rtol=0, atol=1e-5 * np.abs(one).max(), err_msg=name)


def test_mean_of_the_tokens_that_are_no_padding() -> None:
    model = small(head="class", classes=3, layers=1, pool="mean")
    params = drawn(model)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    got = outputs(model, params, FULL | {"keep": KEEP})
    for row, kept in enumerate(np.asarray(KEEP)):
        ids, types = np.asarray(IDS)[row][kept], np.asarray(TYPES)[row][kept]
        want = encoder_oracle.outputs(model.config, exact, ids, types)
        for name in ("pooled", "class"):
            np.testing.assert_allclose(got[name][row], want[name], rtol=0, atol=1e-5, err_msg=name)
    assert "pooler" not in params["encoder"]
    all_kept = outputs(model, params, FULL)["pooled"]  # the control: padding would count
    assert np.abs(all_kept[1] - got["pooled"][1]).max() > 1e-3


def test_the_mean_is_summed_in_float32_whatever_the_precision() -> None:
    model = small("pure-bf16", head="class", layers=1, pool="mean")
    params = jax.eval_shape(model.init, jax.random.key(0))
    sums = [
        e for e in equations(lambda p: model.apply(p, {"ids": IDS, "keep": KEEP})[0], params)
        if e.primitive.name == "reduce_sum" and e.params["axes"] == (1,)
        and e.invars[0].aval.shape == (*IDS.shape, 16)
    ]  # fmt: skip
    assert [e.invars[0].aval.dtype.name for e in sums] == ["float32"]


@pytest.mark.parametrize(
    ("size", "count"),
    [("bert-base", 109_482_240), ("bert-large", 335_141_888), ("minilm-l6", 22_713_216)],
)
def test_published_parameter_counts(size: str, count: int) -> None:
    params = jax.eval_shape(encoder(size).init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == count


def test_padding_changes_nothing_but_itself() -> None:
    model = small(head="token", classes=3, layers=1)
    params = drawn(model)
    alone = outputs(model, params, IDS[1:, :5])["token"][0]
    kept = outputs(model, params, {"ids": IDS, "keep": KEEP})["token"]
    np.testing.assert_allclose(kept[1, :5], alone, rtol=0, atol=1e-6 * np.abs(alone).max())
    seen = outputs(model, params, {"ids": IDS, "keep": KEEP | True})["token"]
    np.testing.assert_array_equal(kept[0], seen[0])
    seen = seen[1, :5]  # the control
    assert np.abs(seen - alone).max() > 1e-2


def test_each_token_sees_the_ones_behind_it_and_the_type_counts() -> None:
    model = small(head="pretrain")
    params = drawn(model)
    zeros = {"ids": IDS, "types": jnp.zeros_like(IDS)}
    a = outputs(model, params, zeros)["features"]
    b = outputs(model, params, zeros | {"ids": IDS.at[:, -1].set(31)})["features"]
    assert np.abs(a[:, 0] - b[:, 0]).max() > 1e-3
    assert np.abs(a - outputs(model, params, FULL)["features"])[:, :4].max() > 1e-3


def test_how_the_layers_are_run_does_not_matter() -> None:
    params, outs = drawn(small()), []
    for how in (dict(loop="unroll"), dict(loop="scan", remat="full")):
        run = applied(small(dropout=0.3, **how))
        outs.append(run(params, IDS, key=jax.random.key(5), train=True)[0]["features"])
    np.testing.assert_allclose(*outs, rtol=0, atol=2e-5)
    assert np.abs(outs[0] - outputs(small(), params, IDS)["features"]).max() > 0.1  # dropout


def test_a_rule_on_a_path_acts_there_only() -> None:
    # primitive -> the paths that a rule names, and how often it occurs without any
    named = {
        "exp": (["layers/0/attention/softmax"], 1),
        "rsqrt": (["layers/0/norm_mlp", "norm_embed", "masked/norm"], 4),
        "erfc": (["layers/mlp/activation", "masked/activation"], 2),
        "tanh": (["pooler/activation"], 1),
        "dot_general": (["pooler/dense", "masked/head", "next/head"], 6 + 2 + 4),
    }
    every = [path for paths, _ in named.values() for path in paths]
    # The statistics of a norm in float16 are float32; those of one in bfloat16 are bfloat16.
    shorts = {"rsqrt": jnp.bfloat16}
    words = {path: "bf16" if "norm" in path else "f16" for path in every}
    rules = [f"encoder/{path}=p=f32,c={words[path]},o=bf16" for path in every]

    def low(precision: Any) -> dict[str, tuple[int, int]]:
        model = small(precision, head="pretrain", layers=1)
        params = jax.eval_shape(model.init, jax.random.key(0))
        found = equations(lambda p: model.apply(p, FULL)[0], params)
        inputs = {name: [e.invars[0] for e in found if e.primitive.name == name] for name in named}
        return {
            name: (sum(v.aval.dtype == shorts.get(name, jnp.float16) for v in vs), len(vs))
            for name, vs in inputs.items()
        }

    assert low("bf16") == {name: (0, count) for name, (_, count) in named.items()}
    assert low(get_precision("bf16", rules=rules)) == {
        name: (len(paths), count) for name, (paths, count) in named.items()
    }


def test_each_head_has_its_outputs() -> None:
    wanted = {"none": ["pooled"], "masked": ["masked"], "class": ["class", "pooled"]}
    for head, names in wanted.items():
        model = small(head=head, classes=3)
        params = jax.eval_shape(model.init, jax.random.key(0))
        outs = jax.eval_shape(model.apply, params, IDS)[0]
        assert sorted(outs) == sorted(["features", *names])
        assert outs.get("class", jnp.zeros((2, 3))).shape == (2, 3)


def test_mixed_presets_give_logits_in_float32() -> None:
    model = small("bf16", head="pretrain")
    params = jax.eval_shape(model.init, jax.random.key(0))
    outs = jax.eval_shape(model.apply, params, IDS)[0]
    found = {name: y.dtype.name for name, y in outs.items()}
    assert found == {
        "features": "bfloat16", "pooled": "bfloat16", "masked": "float32", "next": "float32"
    }  # fmt: skip


def _objective(model: Encoder) -> Any:
    def loss(params: Any, batch: Any, *, state: Any, key: Any, train: bool) -> Any:
        out, state = model.apply(params, batch["ids"], state=state, key=key, train=train)
        return -jnp.mean(jax.nn.log_softmax(out["class"].astype(jnp.float32))[:, 0]), state

    return loss


@pytest.mark.parametrize("precision", ["fp8-delayed", "pure-bf16-sr", "O2"])
def test_it_trains_under_recipes_and_low_storage(precision: str) -> None:
    model = small(precision, head="class", layers=1, dropout=0.1)
    opt = wrap(optax.sgd(0.1), model.precision)
    state = jax.eval_shape(
        lambda: init_state(model.init(jax.random.key(0)), opt, model_state=model.init_state())
    )
    step = make_train_step(_objective(model), opt).function
    after, metrics = jax.eval_shape(step, state, {"ids": IDS})  # traced: shapes and dtypes agree
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.leaves(after) == jax.tree.leaves(state)
    assert metrics["loss"].dtype == jnp.float32


def test_delayed_scaling_sees_the_pooler_too() -> None:
    model = small("fp8-delayed", head="class", layers=1)
    _, state = applied(model)(drawn(model), IDS, state=model.init_state())
    assert set(state["amax"]) == {"layers", "pooler"}
    seen = state["amax"]["pooler"]["dense"]["kernel"].observed_amax
    assert (np.asarray(seen)[:2] > 0).all()  # of x and W; that of dy comes with the gradient


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
        ({"head": "class", "classes": 0}, "classes=0 must be at least 1"),
        ({"pool": "men"}, "pool='men' is unknown; known: first mean"),
        ({"pool": "mean", "head": "token"}, "head='token' pools nothing, pool='mean'; leave"),
        ({"types": -1}, "types=-1 must not be negative"),
        ({"clases": 3}, "unknown field 'clases'; did you mean classes"),
    ],
    ids=["head", "classes", "pool", "pools", "types", "field"],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tokens": IDS}, "the batch holds tokens and no 'ids'"),
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
