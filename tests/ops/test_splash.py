"""The splash kernel of TPUs, interpreted: against float64, against ours, and where it serves."""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.models import decoder
from mpjax.ops import attention, kernel_for
from mpjax.ops.splash import splash_attention
from mpjax.ops.target import tracing_for
from mpjax.precision import parse_policy
from mpjax.train import parse_mesh
from mpjax.train.sharding import ShardActivations

BF16, WIDE = parse_policy("bf16"), parse_policy("c=f32,o=bf16")
B, T, H, G, K = 2, 256, 4, 2, 16
BLOCKS_OF_A_PACK = [[100, 156], [256]]
pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernel runs on a CPU, and what it was called with is noted."""
    called: list[Any] = []

    def run(*args: Any, **options: Any) -> Any:
        called.append([x.shape for x in args[:3]])
        return splash_attention(*args, **options, interpret=True)

    # not by attributes: `mpjax.ops` has a function of the module's name
    monkeypatch.setattr(sys.modules["mpjax.ops.attention"], "splash_attention", run)
    return called


def operands(low: Any = jnp.bfloat16) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(B, T, n, K)), low) for n in (H, G, G)]


SEGMENTS = jnp.asarray([np.repeat(range(len(row)), row) for row in BLOCKS_OF_A_PACK])
KEEP = jnp.asarray(np.arange(T)[None] >= np.array([[0], [37]]))  # padding on the left
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "both sides": {"causal": False},
    "window": {"window": 70},
    "window of both sides": {"window": 70, "causal": False},
    "padding": {"keep_BS": KEEP},
    "padding of both sides": {"keep_BS": KEEP, "causal": False},
    "documents": {"segments_BT": SEGMENTS},
    "all": {"segments_BT": SEGMENTS, "keep_BS": KEEP, "window": 70},
}


def seen(causal: bool = True, window: int = 0, keep_BS: Any = None, segments_BT: Any = None) -> Any:
    """Which keys each query sees, (B, T, T), from the words of the docstring."""
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    out = np.broadcast_to((s <= t) if causal else np.ones((T, T), bool), (B, T, T)).copy()
    if window:
        out &= abs(t - s) < window
    if keep_BS is not None:
        out &= np.asarray(keep_BS)[:, None]
    if segments_BT is not None:
        ids = np.asarray(segments_BT)
        out &= ids[:, :, None] == ids[:, None]
    return out


def exact(q: Any, k: Any, v: Any, dy: Any, mask: Any) -> tuple[Any, list[Any]]:
    """Output and gradients in float64; a query that sees nothing gives zeros."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    k, v = (np.repeat(x, H // G, axis=2) for x in (k, v))
    scores = np.where(mask[:, None], np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K), -1e30)
    p = np.exp(scores - scores.max(-1, keepdims=True)) * mask[:, None]
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-30)
    out = np.einsum("bhts,bshk->bthk", p, v)
    dp = np.einsum("bthk,bshk->bhts", dy, v)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) / np.sqrt(K)
    dq = np.einsum("bhts,bshk->bthk", ds, k)
    dk, dv = np.einsum("bhts,bthk->bshk", ds, q), np.einsum("bhts,bthk->bshk", p, dy)
    return out, [dq, *(x.reshape(B, T, G, H // G, K).sum(3) for x in (dk, dv))]


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_against_float64(case: str, interpreted: list[Any]) -> None:
    args, options = operands(), CASES[case]
    mask = seen(**options)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(B, T, H, K)), jnp.bfloat16)
    dy = jnp.where(jnp.asarray(mask.any(-1))[..., None, None], dy, 0)  # their outputs are not used

    def run(kernel: str) -> list[Any]:
        def attend(*qkv: Any) -> Any:
            return attention(*qkv, BF16, WIDE, kernel=kernel, **options)

        with tracing_for("tpu"):
            out, back = jax.vjp(attend, *args)
            return [np.asarray(x, np.float64) for x in (out, *back(dy))]

    splash, ours = run("auto"), run("xla")
    assert len(interpreted) == 1
    want, gradients = exact(*args, dy, mask)
    some = mask.any(-1)[..., None, None]
    for name, mine, other, right in zip("oqkv", splash, ours, (want, *gradients), strict=True):
        valid = some if name in "oq" else np.ones_like(some)
        off, off_xla = (np.abs(np.where(valid, x - right, 0)).max() for x in (mine, other))
        # three roundings to bfloat16 of a number of this size; ours has as many and more
        assert off <= 3 * 2**-8 * np.abs(right).max(), (case, name, off)
        assert off <= 1.5 * off_xla + 1e-6, (case, name, off, off_xla)
        assert np.isfinite(mine).all()


def test_the_oracle_tells_cases_apart() -> None:
    masks = [seen(**options) for options in CASES.values()]
    assert all((a != b).any() for n, a in enumerate(masks) for b in masks[:n])


def test_document_2_does_not_depend_on_document_1() -> None:
    q, k, v = operands()
    others = [x.at[0, :100].set(9.0) for x in (q, k, v)]
    with tracing_for("tpu"):
        outs = [attention(*qkv, BF16, WIDE, segments_BT=SEGMENTS, kernel="splash")
                for qkv in ((q, k, v), others)]  # fmt: skip
        control = [attention(*qkv, BF16, WIDE, kernel="splash") for qkv in ((q, k, v), others)]
    assert (outs[0][0, 100:] == outs[1][0, 100:]).all()
    assert (control[0][0, 100:] != control[1][0, 100:]).any()


def test_each_device_runs_it_on_its_part(interpreted: list[Any]) -> None:
    """A model on 2 x 2 x 2 devices, against itself on one and on XLA's kernel."""
    model = decoder("tiny", "bf16", layers=1, width=64, heads=4, kv_heads=2, vocabulary=64,
                    context=128)  # fmt: skip
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 128), 0, 64)
    batch = {"inputs": tokens, "targets": tokens}
    mesh = parse_mesh("data=2,fsdp=2,tensor=2")

    def run(kernel: str, parts: bool) -> Any:
        tuned = decoder("tiny", "bf16", layers=1, width=64, heads=4, kv_heads=2, vocabulary=64,
                        context=128, kernel=kernel)  # fmt: skip
        tuned = tuned.sharded(ShardActivations(mesh)) if parts else tuned
        with tracing_for("tpu", devices=8 if parts else 1):
            return jax.jit(jax.value_and_grad(lambda p: tuned.loss(p, batch)[0]))(params)

    (loss, gradients), (one, alone), (xla, other) = (
        run("auto", True), run("auto", False), run("xla", False),
    )  # fmt: skip
    shapes = [[(8 // 4, n, 128, 16) for n in (2, 1, 1)], [(8, n, 128, 16) for n in (4, 2, 2)]]
    assert [s for n, s in enumerate(interpreted) if s not in interpreted[:n]] == shapes
    assert abs(loss - one) < 1e-3 * abs(one) and abs(loss - xla) < 1e-3 * abs(xla)

    def apart(a: Any, b: Any) -> float:
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return max(float(jnp.abs(x - y).max() / jnp.abs(y).max()) for x, y in pairs)

    assert apart(gradients, alone) < 0.03 and apart(gradients, other) < 0.03


SERVES = dict(queries=256, keys=256, width=64, from_start=True, masked=True, divided=True)
LOW, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")


@pytest.mark.parametrize(
    "change",
    [{"operands": F32}, {"operands": jnp.dtype("float16")}, {"softmax": LOW}, {"queries": 128},
     {"queries": 200, "keys": 200}, {"from_start": False}, {"divided": False}],
    ids=str,
)  # fmt: skip
def test_where_it_does_not_serve_auto_is_xla(change: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"operands": LOW, "softmax": F32} | SERVES
    with tracing_for("tpu"):
        assert kernel_for("auto", **settings) == "splash" == kernel_for("splash", **settings)
        assert kernel_for("auto", **settings | change) == "xla"
        with pytest.raises(
            ConfigError, match="kernel 'splash' needs a TPU, .*; here: tpu, .*'xla'"
        ):
            kernel_for("splash", **settings | change)
    for platform in ("cpu", "gpu"):
        with tracing_for(platform):
            assert kernel_for("auto", **settings) == "xla"


def test_a_mesh_that_parts_queries_from_their_keys_takes_xla(interpreted: list[Any]) -> None:
    mesh = parse_mesh("data=4,tensor=2")
    model = decoder("tiny", "bf16", layers=1, width=64, heads=4, kv_heads=1, vocabulary=64,
                    context=128).sharded(ShardActivations(mesh))  # fmt: skip
    params = model.init(jax.random.key(0))
    tokens = jnp.zeros((4, 128), jnp.int32)
    with tracing_for("tpu", devices=8):
        jax.eval_shape(model.loss, params, {"inputs": tokens, "targets": tokens})
    assert not interpreted


def test_it_is_lowered_for_a_tpu() -> None:
    """Through Mosaic, with no TPU here; forward and both backward kernels."""
    args = operands()

    def loss(*qkv: Any) -> Any:
        run = functools.partial(splash_attention, causal=True, window=0)
        return run(*(x.transpose(0, 2, 1, 3) for x in qkv), ()).astype(jnp.float32).sum()

    exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["tpu"])(*args)
    assert exported.mlir_module().count("tpu_custom_call") >= 3
