"""What people write and JAX's own functions do not: names like JAX's, state, counts, meshes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mpjax.errors import ConfigError
from mpjax.interpret import audit, autocast, monitor, trace_nonfinite

pytestmark = pytest.mark.usefixtures("fast_compile")
X = jax.random.normal(jax.random.key(0), (4, 8))
W = jax.random.normal(jax.random.key(1), (8, 8))


# --- names --------------------------------------------------------------------------------------


@jax.custom_vjp
def round(x: Any) -> Any:
    """A straight-through estimator, called like a primitive."""
    return jnp.round(x)


round.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@jax.jit
def stack(x: Any) -> Any:
    """Layers on each other, called like a function of jax.numpy."""
    return jnp.tanh(x @ W) @ W


@jax.jit
def norm(x: Any) -> Any:
    return x @ W


@pytest.mark.parametrize("fn", [stack, norm])
def test_a_function_called_like_one_of_jax_is_the_users_own(fn: Any) -> None:
    assert audit(autocast(fn, "bf16"), X).share("bfloat16") == 1
    assert audit(autocast(autocast(fn, "bf16"), "bf16"), X).share("bfloat16") == 1


def test_a_rule_called_like_a_primitive_keeps_its_gradient() -> None:
    f = autocast(lambda x: round(x @ W).sum(), "bf16")
    want = jax.grad(lambda x: (x.astype(jnp.bfloat16) @ W.astype(jnp.bfloat16)).sum())(X)
    np.testing.assert_array_equal(jax.grad(f)(X), want)
    assert not np.allclose(f(X), 0)


@pytest.mark.parametrize("kind", ["low", "widest"])
@pytest.mark.parametrize("name", ["log_softmax", "softplus"])
def test_functions_that_jax_keeps_can_be_moved(kind: str, name: str) -> None:
    f = lambda x: getattr(jax.nn, name)(x @ W)  # noqa: E731
    cast = jax.jit(autocast(f, "bf16", restore_dtypes=False, **{kind: [name]}))
    usual = jax.jit(autocast(f, "bf16", restore_dtypes=False))
    assert (cast(X).dtype, usual(X).dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(cast(X).astype(jnp.float32), f(X), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("name", "fn"), [("top_k", lambda x: lax.top_k(x, 2)), ("split", lambda x: jnp.split(x, 2))]
)
def test_operations_with_several_results_can_be_low(name: str, fn: Any) -> None:
    outs = jax.jit(autocast(fn, "bf16", low=[name], restore_dtypes=False))(X)
    assert outs[0].dtype == jnp.bfloat16 and len(outs) == 2
    np.testing.assert_allclose(outs[0].astype(jnp.float32), fn(X)[0], rtol=0.01)


def test_groups_of_a_ragged_product_are_counted_once() -> None:
    groups, x, w = jnp.full((4,), 16, jnp.int32), jnp.ones((64, 8)), jnp.ones((4, 8, 16))
    loss = lambda x, w: lax.ragged_dot(x, w, groups).sum()  # noqa: E731
    found = audit(jax.grad(loss, (0, 1)), x, w).products
    assert [p.flops for p in found] == 3 * [2 * 64 * 8 * 16]


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_function_applied_to_a_place_is_that_function(dtype: str) -> None:
    for own in (jnp.sin, lambda v: v + 1, lambda v: v * 0.5):
        f = lambda x, own=own: (x @ W).at[0].apply(own)  # noqa: E731
        np.testing.assert_allclose(autocast(f, dtype)(X), f(X), atol=0.06)


def test_a_count_beyond_float16_is_not_clamped() -> None:
    mask = jnp.ones((4, 100_000), bool)
    f = lambda x, m: (x @ W) * 1000.0 / m.astype(jnp.float32).sum(-1, keepdims=True)  # noqa: E731
    np.testing.assert_allclose(autocast(f, "fp16")(X, mask), f(X, mask), rtol=0.02, atol=1e-4)
    running = lambda x, m: (x @ W)[:, :1] / m.astype(jnp.float32).cumsum(-1)[:, -1:]  # noqa: E731
    np.testing.assert_allclose(autocast(running, "fp16")(X, mask), running(X, mask), rtol=0.02)
    few = jax.make_jaxpr(autocast(f, "fp16", restore_dtypes=False))(X, mask[:, :8])
    assert few.out_avals[0].dtype == jnp.float16, "a small count is exact, and widens nothing"


def test_rows_of_a_loop_end_apart_and_are_measured() -> None:
    def rows(x: Any) -> Any:
        def one(v: Any) -> Any:
            return lax.while_loop(
                lambda s: s[0] < 3 * jnp.abs(v[0]), lambda s: (s[0] + 1, jnp.tanh(s[1] @ W)),
                (jnp.float32(0), v),
            )[1]  # fmt: skip

        return jax.vmap(one)(x)

    np.testing.assert_array_equal(monitor(rows)(X)[0], rows(X))
    assert trace_nonfinite(rows, X) is None


# --- state and what is closed over --------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.linear, self.drop = nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.drop(self.linear(x))


def test_counts_of_a_module_that_would_be_lost_are_refused() -> None:
    block = Block()
    with pytest.raises(ConfigError, match=r"changes args\[0\].drop.*would be lost.*nnx.split"):
        autocast(lambda m, x: m(x).mean(), "bf16")(block, X)
    with pytest.raises(ConfigError, match="monitor: the call changes"):
        monitor(lambda m, x: m(x).mean())(block, X)
    assert audit(lambda m, x: m(x).mean(), block, X).flops > 0, "what only looks loses nothing"
    graph, params, rest = nnx.split(block, nnx.Param, ...)

    def returned(params: Any, rest: Any, x: Any) -> Any:
        whole = nnx.merge(graph, params, rest)
        return whole(x).mean(), nnx.state(whole, nnx.Not(nnx.Param))

    first, rest = autocast(returned, "bf16")(params, rest, X)
    assert autocast(returned, "bf16")(params, rest, X)[0] != first  # another mask
    block.eval()
    assert jnp.isfinite(autocast(lambda m, x: m(x).mean(), "bf16")(block, X))
    batch = {"x": X}  # a dict is the function's own

    def scaled(batch: Any) -> Any:
        batch["x"] = batch["x"] * 2
        return batch["x"].sum()

    assert float(autocast(scaled, "bf16")(batch)) == float(2 * X.sum())


def test_a_nan_that_is_closed_over_is_found() -> None:
    bad = jnp.full((8, 3), jnp.nan)
    found = trace_nonfinite(lambda x: (x @ bad).sum(), X)
    assert found is not None and "closed-over array of (8, 3)" in str(found)


# --- meshes -------------------------------------------------------------------------------------

MESH = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
ROWS = jnp.abs(jax.random.normal(jax.random.key(2), (8, 8))) + 0.5


@pytest.mark.parametrize("reduce", [lax.pmean, lax.psum])
def test_a_shard_that_breaks_before_a_reduction_is_found(reduce: Any) -> None:
    loss = jax.shard_map(
        lambda a: reduce(jnp.mean(jnp.log(a)), "d"), mesh=MESH, in_specs=P("d"), out_specs=P()
    )
    found = trace_nonfinite(loss, ROWS.at[3].set(0))
    assert found is not None and "log" in str(found) and "shard  3" in str(found)
    assert trace_nonfinite(loss, ROWS) is None


def test_branches_in_a_shard_map_record_alike() -> None:
    f = jax.shard_map(
        lambda a: lax.cond(a.sum() > 5, lambda a: jnp.tanh(a @ W), jnp.log, a),
        mesh=MESH, in_specs=P("d"), out_specs=P("d"),
    )  # fmt: skip
    np.testing.assert_array_equal(monitor(f)(ROWS)[0], f(ROWS))
    assert trace_nonfinite(f, ROWS) is None
    found = trace_nonfinite(f, ROWS.at[3].set(0))
    assert found is not None and "shard  3" in str(found)


def test_arrays_of_an_explicit_mesh_are_measured() -> None:
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))
    cut = jax.device_put(ROWS, NamedSharding(mesh, P("d", None)))
    f = lambda x, w: jnp.tanh(x @ w)  # noqa: E731
    out, seen = jax.jit(monitor(f))(cut, W)
    np.testing.assert_array_equal(out, jax.jit(f)(cut, W))
    assert seen


# --- notebooks ----------------------------------------------------------------------------------


def test_a_line_of_a_notebook_is_that_of_its_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # its history is not the user's
    interactive = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell
    shell = interactive.instance(user_ns={"trace_nonfinite": trace_nonfinite, "jnp": jnp, "X": X})
    try:
        shell.run_cell("one = 1", store_history=True)
        shell.run_cell("def broken(x):\n    return jnp.log(x - x)", store_history=True)
        shell.run_cell("found = trace_nonfinite(broken, X)", store_history=True)
        text = str(shell.user_ns["found"])
    finally:
        interactive.clear_instance()
    assert "Cell In[2]:2 (broken)" in text
    plain = trace_nonfinite(lambda x: jnp.log(x - x), X)
    assert f"{__file__}:" in str(plain), "elsewhere it is the file"
