"""The residual network: against loops in numpy, by path and dtype, and in the train step."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from experiments.common.stablehlo import convolutions
from mpjax.errors import ConfigError
from mpjax.formats.delayed import observed_of, with_observed
from mpjax.models import ResNet, resnet, resnet_config
from mpjax.train import ShardActivations, parse_mesh
from mpjax.train.sharding import partition
from tests.models.shapes import FAST, stirred
from tests.ops.test_conv import naive

pytestmark = pytest.mark.usefixtures("fast_compile")
X32 = "fp32 rule:**/conv*=p=f32,c={0},o=f32"
SIZE = dict(widths=(4, 8), groups=2, classes=3, inputs=2)
RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(4, 5, 6, 2)), jnp.float32)
BATCH = {"inputs": IMAGES, "targets": jnp.asarray([0, 1, 2, 1], jnp.int32)}


def small(precision: Any = "fp32", **changes: Any) -> ResNet:
    return resnet("tiny", precision, **(SIZE | changes))


def lowered(model: ResNet) -> Any:
    params = jax.eval_shape(model.init, jax.random.key(0))
    step = jax.value_and_grad(lambda p: model.loss(p, BATCH, key=jax.random.key(1))[0])
    return jax.jit(step).lower(params)


def loss_of(model: ResNet, params: Any, batch: Any) -> float:
    return float(jax.jit(lambda p, b: model.loss(p, b)[0], compiler_options=FAST)(params, batch))


def oracle(params: Any, x: Any, groups: int) -> np.ndarray:
    """Logits in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)["resnet"]

    def norm(x: Any, q: Any) -> Any:
        N, H, W, C = x.shape
        g = x.reshape(N, H, W, groups, -1)
        g = g - g.mean((1, 2, 4), keepdims=True)
        g = g / np.sqrt((g * g).mean((1, 2, 4), keepdims=True) + 1e-5)
        return np.maximum(g.reshape(x.shape) * q["scale"] + q["bias"], 0)

    x = naive(np.asarray(x, np.float64), p["conv_stem"]["kernel"], 1)
    for number in range(2):
        b = p[f"stage{number}"]["block0"]
        y = norm(x, b["norm1"])
        short = naive(y, b["conv_shortcut"]["kernel"], 1 + number) if number else x
        y = norm(naive(y, b["conv1"]["kernel"], 1 + number), b["norm2"])
        x = short + naive(y, b["conv2"]["kernel"], 1)
    return norm(x, p["norm"]).mean((1, 2)) @ p["head"]["kernel"] + p["head"]["bias"]


def test_logits_and_loss_are_those_of_loops_in_float64() -> None:
    model = small()
    params = stirred(model)
    want = oracle(params, IMAGES, 2)
    logits = jax.jit(lambda p: model.apply(p, IMAGES)[0], compiler_options=FAST)(params)
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-5 * np.abs(want).max())
    log_p = want - np.log(np.exp(want).sum(-1, keepdims=True))
    loss = -log_p[np.arange(4), BATCH["targets"]].mean()
    assert abs(loss_of(model, params, BATCH) - loss) < 1e-5
    weighted = BATCH | {"weights": jnp.asarray([1.0, 0.0, 0.0, 0.0])}
    assert abs(loss_of(model, params, weighted) + log_p[0, 0]) < 1e-5
    # GroupNorm: an image does not see the others, so microbatches change nothing
    halves = [jax.tree.map(lambda a, h=h: a[2 * h : 2 * h + 2], BATCH) for h in (0, 1)]
    assert abs(np.mean([loss_of(model, params, half) for half in halves]) - loss) < 1e-5


@pytest.mark.parametrize(
    ("precision", "forward"),
    [
        ("fp32", "f32 * f32 -> f32"),
        (X32.format("bf16"), "bf16 * bf16 -> f32"),  # X32 * K16 -> Y32
        (X32.format("f16"), "f16 * f16 -> f32"),
        ("bf16", "bf16 * bf16 -> bf16"),  # X16 * K16 -> Y16
        ("fp16", "f16 * f16 -> f16"),
        ("pure-bf16", "bf16 * bf16 -> bf16"),
    ],
)
def test_both_modes_are_in_the_program(precision: str, forward: str) -> None:
    operand = forward.split()[0]
    program = lowered(small(precision))
    # weight gradients, the only other kind, always leave in float32
    assert set(convolutions(program)) == {forward, f"{operand} * {operand} -> f32"}
    between = re.findall(r"stablehlo\.maximum .*<(?:\d+x){4}(b?f\d+)>", program.as_text())
    assert between and set(between) == {forward.split()[-1]}


def test_a_rule_on_one_convolution_acts_there_only() -> None:
    text = lowered(small("fp32 rule:resnet/stage1/block0/conv1=p=f32,c=bf16,o=f32")).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    low = [line for line in lines if "bf16" in line]
    assert len(low) == 3 and len(lines) == 3 * 6 - 1  # no gradient of the images
    assert all("8xbf16" in line for line in low)


def test_paths_name_every_part() -> None:
    paths = small().paths
    assert {
        "resnet/conv_stem/kernel", "resnet/stage1/block0/conv_shortcut",
        "resnet/stage0/block0/norm2", "resnet/stage0/block0/residual", "resnet/pool",
        "resnet/head/bias", "resnet/loss",
    } <= set(paths)  # fmt: skip
    assert not [path for path in paths if "stage0/block0/conv_shortcut" in path]


def test_it_computes_cut_over_a_mesh_what_it_computes_on_one_device() -> None:
    model, mesh = small(widths=(4,)), parse_mesh("data=2,fsdp=2,tensor=2")
    params = stirred(model)

    def cut(w: Any, names: Any) -> Any:
        return jax.device_put(w, NamedSharding(mesh, partition(names, w.shape, mesh)))

    spread = jax.tree.map(cut, params, model.axes)
    assert not spread["resnet"]["stage0"]["block0"]["conv1"]["kernel"].is_fully_replicated

    def gradients(model: ResNet, params: Any) -> Any:
        step = jax.value_and_grad(lambda p: model.loss(p, BATCH)[0])
        return jax.jit(step, compiler_options=FAST)(params)

    one, many = gradients(model, params), gradients(model.sharded(ShardActivations(mesh)), spread)
    for a, b in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_delayed_scaling_threads_its_amax_forward_and_back() -> None:
    model = small("fp8-delayed", widths=(4,))
    params, state = jax.jit(model.init)(jax.random.key(0)), model.init_state()
    assert set(state["amax"]) == {"conv_stem", "stage0"}  # the head stays high

    def loss(seen: Any) -> Any:
        return model.loss(params, BATCH, state=with_observed(state, seen))

    backward, after = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)(
        observed_of(state)
    )
    stem = after["amax"]["conv_stem"]["kernel"].observed_amax
    kernel = params["resnet"]["conv_stem"]["kernel"]
    assert float(stem[0]) == float(jnp.abs(IMAGES).max().astype(jnp.bfloat16))
    assert float(stem[1]) == float(jnp.abs(kernel).max())
    assert all(float(amax[2]) > 0 for amax in backward)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet("tinny"), "model: unknown size 'tinny'; did you mean tiny"),
        (lambda: resnet("tiny", clases=3), "model: unknown field 'clases'; did you mean classes"),
        (lambda: small(widths=()), "widths is empty"),
        (lambda: small(widths=(4, 6), groups=4), "width 6 is no positive multiple of groups=4"),
        (lambda: small(classes=1), "classes=1 must be at least 2"),
        (lambda: small("bf16 rule:**/convv1=fp32"), r"matches no path .*\*\*/conv1"),
        (lambda: small("bf16 rule:**/norm*=fp8"), "recipe 'fp8' quantises matrix products"),
        (lambda: small().apply({}, IMAGES[..., :1]), r"shape \(4, 5, 6, 1\) is not \(N, H, W, 2\)"),
        (lambda: small().apply({}, IMAGES.astype(jnp.uint8)), "uint8 is not floating-point"),
        (lambda: resnet_config("tiny", epsilon=0.0), "epsilon=0.0 must be positive"),
    ],
)
def test_mistakes_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_a_recipe_that_convolutions_do_not_take_says_where() -> None:
    model = small("nvfp4", widths=(4,))
    with pytest.raises(ConfigError, match="resnet/conv_stem: recipe 'nvfp4' has a Hadamard"):
        jax.eval_shape(
            lambda p: model.loss(p, BATCH, key=jax.random.key(0)),
            jax.eval_shape(model.init, jax.random.key(0)),
        )
