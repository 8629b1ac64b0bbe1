"""Our pytree nodes through flax.serialization, in whatever order the two are imported."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import quantize
from mpjax.optim import (
    DynamicLossScale,
    LeafLossScale,
    LogMaxLossScale,
    MultiLossScale,
    NoOpLossScale,
    StaticLossScale,
    quantize_blocks,
    wrap,
)
from mpjax.precision import get_precision
from tests.optim.scaled_step import scaled_step

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)
W = {"w": X, "b": jnp.ones(3)}


def advanced(scale: Any) -> Any:
    for finite in (True, False, True):
        scale = scale.adjust(jnp.bool_(finite), {"a": jnp.ones(2), "b": jnp.ones(1)})
    return scale


SCALES: dict[str, Callable[[], Any]] = {
    "none": NoOpLossScale,
    "static": lambda: StaticLossScale(8.0),
    "dynamic": lambda: advanced(DynamicLossScale(growth_interval=2)),
    "logmax": lambda: advanced(LogMaxLossScale()),
    "leaf": lambda: advanced(LeafLossScale(["a", "**"])),
    "multi": lambda: MultiLossScale([DynamicLossScale(), StaticLossScale(2.0)]),
}
QUANTIZED = (
    ("e4m3", "tensor"), ("e5m2", "row"), ("e2m1", "nv(16)"), ("e4m3", "mx(32)"), ("int8", "row"),
    ("int4", "row"), ("int2", "row"), ("e3m2", "row"), ("bfloat16", "none"), ("e3m4", "row"),
)  # fmt: skip
NODES = SCALES | {f"{f} {s}": functools.partial(quantize, X, f, s) for f, s in QUANTIZED}
NODES |= {"offset": lambda: quantize(X, "int8", "row", offset=True)}
for moment in ("int8@64", "int4@32", "e4m3@64"):
    NODES[moment] = functools.partial(quantize_blocks, X, moment, signed=True)
pytestmark = pytest.mark.usefixtures("fast_compile")


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(map(np.asarray, jax.tree.leaves(a)), jax.tree.leaves(b), strict=True):
        y = np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


@pytest.mark.parametrize("name", NODES)
def test_a_node_comes_back_bit_for_bit(name: str) -> None:
    node = {"here": NODES[name]()}
    target = jax.tree.map(jnp.zeros_like, node)
    same(flax.serialization.from_bytes(target, flax.serialization.to_bytes(node)), node)
    state = flax.serialization.to_state_dict(node)
    same(flax.serialization.from_state_dict(target, state), node)


@pytest.mark.parametrize("options", [{}, {"moments": "int8@64"}, {"loss_scale": "logmax"}])
def test_the_state_of_an_optimizer_comes_back(options: dict[str, Any]) -> None:
    optimizer = wrap(optax.adam(1e-3), get_precision("fp16", **options))
    step = scaled_step(optimizer)
    _, state = step(W, optimizer.init(W), W)
    back = flax.serialization.from_bytes(optimizer.init(W), flax.serialization.to_bytes(state))
    same(back, state)
    same(step(W, back, W), step(W, state, W))


@pytest.mark.parametrize(
    ("saved", "target", "words"),
    [
        (
            DynamicLossScale,
            lambda: DynamicLossScale(2.0),
            "saved with dynamic, .* has dynamic:init=2;",
        ),
        (
            lambda: StaticLossScale(2.0),
            DynamicLossScale,
            "holds scale settings, expected good_steps",
        ),
        (
            NODES["int8@64"],
            lambda: quantize_blocks(X, "int8-linear", signed=True),
            "int8@64 signed=True",
        ),
        (NODES["int8 row"], lambda: quantize(X.T, "int8", "row"), r"int8 tile=\(1, 64\)"),
    ],
)
def test_what_was_saved_with_other_settings_is_refused(
    saved: Callable[[], Any], target: Callable[[], Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        flax.serialization.from_bytes(target(), flax.serialization.to_bytes(saved()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("order", ["mpjax, flax.serialization", "flax.serialization, mpjax"])
def test_either_may_be_imported_first(order: str) -> None:
    code = f"""
import sys
import {order.split(", ")[0]}
assert "mpjax" in sys.modules or "flax" in sys.modules
assert ("flax" in sys.modules) == {order.startswith("flax")}
import {order.split(", ")[1]}
import flax.serialization
print(len(flax.serialization.to_bytes(mpjax.StaticLossScale(2.0))) > 10)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "True\n", run.stderr
