"""autocast through control flow and custom rules: the values and gradients of hand-written casts.

B batch, D width, L layers
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import mpjax
from mpjax.errors import ConfigError
from mpjax.interpret.autocast.autocast import autocast, no_autocast
from mpjax.interpret.core.trace import trace
from mpjax.interpret.core.walk import equations

pytestmark = pytest.mark.usefixtures("fast_compile")

B, D, L = 8, 4, 3
BF16, F32 = jnp.bfloat16, jnp.float32
# XLA on CPUs otherwise leaves out a cast to bfloat16 and back, and nothing could fail here.
_EXACT = {"xla_allow_excess_precision": False}


def _normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), F32)


X, W, C = _normal(0, B, D), _normal(1, D, D), _normal(2, B, D)
WS = _normal(3, L, D, D) / 2


def _low(x: Any) -> Any:
    return x.astype(BF16)


def _jit(fn: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(fn, compiler_options=_EXACT)


def _same(got: Any, wanted: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), got, wanted)


def _dots(fn: Callable[..., Any], *args: Any) -> Counter[str]:
    """How many products of each operand dtype a function has."""
    sites = equations(trace("test", fn, args, {}).closed)
    return Counter(
        str(s.eqn.invars[0].aval.dtype) for s in sites if s.eqn.primitive.name == "dot_general"
    )


def _casts(fn: Callable[..., Any], *args: Any) -> Counter[str]:
    """How many casts to each dtype a function has."""
    sites = equations(trace("test", fn, args, {}).closed)
    return Counter(
        str(s.eqn.params["new_dtype"])
        for s in sites
        if s.eqn.primitive.name == "convert_element_type"
    )


# Control flow, as users write it, and the same with hand-written casts. What only a sum reads runs
# in float32 by demand, so by hand too.


def _nested(by_hand: bool) -> Callable[..., Any]:
    """scan(remat(cond(...) / while))."""

    def halve(state: Any) -> Any:
        count, size = state
        return count + 1, size * 0.5

    def layer(h: Any, w: Any) -> Any:
        def up(h: Any) -> Any:
            return jnp.tanh(_low(h) @ _low(w)) if by_hand else jnp.tanh(h @ w)

        def down(h: Any) -> Any:
            return _low(h) @ _low(w) * 0.5 if by_hand else h @ w * 0.5

        y = lax.cond(jnp.sum(h) > 0, up, down, h)
        start = lax.stop_gradient(jnp.max(jnp.abs(h)))
        _, size = lax.while_loop(lambda s: s[1] > 0.25, halve, (0, start))
        wide = y.astype(F32) if by_hand else y
        return wide / (size + 1.0), y

    def fn(x: Any, ws: Any, c: Any) -> Any:
        h, ys = lax.scan(jax.checkpoint(layer), x, ws)
        ys = ys.astype(F32) if by_hand else ys
        return jnp.sum(h * c), ys

    return fn


def _custom_jvp(by_hand: bool) -> Callable[..., Any]:
    """A rule with a factor of its own, in a function that closes over a tracer."""
    low = _low if by_hand else lambda x: x
    wide = (lambda x: x.astype(F32)) if by_hand else lambda x: x

    def fn(x: Any, w: Any, c: Any) -> Any:
        c = c * 2.0

        @jax.custom_jvp
        def act(x: Any, w: Any) -> Any:
            return wide(jnp.tanh(low(x) @ low(w))) * c

        @act.defjvp
        def rule(primals: Any, tangents: Any) -> Any:
            (x, w), (dx, dw) = primals, tangents
            y = jnp.tanh(low(x) @ low(w))
            t = 3.0 * (low(dx) @ low(w) + low(x) @ low(dw)) * (1.0 - y * y)
            return wide(y) * c, wide(t) * c

        return jnp.sum(act(x, w))

    return fn


def _custom_vjp(by_hand: bool) -> Callable[..., Any]:
    """A rule with a factor of its own, in a function that closes over a tracer."""
    low = _low if by_hand else lambda x: x
    wide = (lambda x: x.astype(F32)) if by_hand else lambda x: x

    def fn(x: Any, w: Any, c: Any) -> Any:
        c = c * 2.0

        @jax.custom_vjp
        def act(x: Any, w: Any) -> Any:
            return wide(low(x) @ low(w)) * c

        def forward(x: Any, w: Any) -> Any:
            return wide(low(x) @ low(w)) * c, (x, w)

        def backward(saved: Any, g: Any) -> Any:
            x, w = saved
            g = low(g * c)
            return wide(2.0 * (g @ low(w).T)), wide(low(x).T @ g)

        act.defvjp(forward, backward)
        return jnp.sum(jnp.sin(act(x, w)) * c)

    return fn


def _called(by_hand: bool) -> Callable[..., Any]:
    """One jitted function, called twice."""
    low = _low if by_hand else lambda x: x

    @jax.jit
    def block(x: Any, w: Any) -> Any:
        y = low(x) @ low(w)
        for _ in range(4):  # long enough to be kept as a call
            y = jnp.sin(y) + jnp.cos(y)
        return y

    def fn(x: Any, w: Any, c: Any) -> Any:
        y = block(x, w)
        y = block(y, w)
        return jnp.sum((y.astype(F32) if by_hand else y) * c)

    return fn


def _sharded(by_hand: bool) -> Callable[..., Any]:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows = PartitionSpec("data")

    def shard(x: Any, w: Any, c: Any) -> Any:
        if by_hand:
            w = lax.pcast(w, "data", to="varying")
            y = jnp.tanh((_low(x) @ _low(w)).astype(F32))
        else:
            y = jnp.tanh(x @ w)
        return lax.psum(jnp.sum(y * c), "data")

    return jax.shard_map(
        shard, mesh=mesh, in_specs=(rows, PartitionSpec(), rows), out_specs=PartitionSpec()
    )


def _batched(by_hand: bool) -> Callable[..., Any]:
    def row(x: Any, w: Any) -> Any:
        return jnp.tanh((_low(x) @ _low(w)).astype(F32)) if by_hand else jnp.tanh(x @ w)

    return lambda x, w, c: jnp.sum(jax.vmap(row, (0, None))(x, w) * c)


FLOWS: dict[str, tuple[Callable[[bool], Any], tuple[Any, ...]]] = {
    "scan(remat(cond, while))": (_nested, (X, WS, C)),
    "custom_jvp": (_custom_jvp, (X, W, C)),
    "custom_vjp": (_custom_vjp, (X, W, C)),
    "jit": (_called, (X, W, C)),
    "shard_map": (_sharded, (X, W, C)),
    "vmap": (_batched, (X, W, C)),
}


def _value_and_grad(fn: Callable[..., Any]) -> Callable[..., Any]:
    def loss(*args: Any) -> Any:
        out = fn(*args)
        return out if isinstance(out, tuple) else (out, ())

    return jax.value_and_grad(loss, (0, 1), has_aux=True)


@pytest.mark.parametrize("flow", FLOWS)
def test_control_flow_gives_the_bits_of_hand_casts(flow):
    make, args = FLOWS[flow]
    got = _jit(_value_and_grad(autocast(make(False), "bf16")))(*args)
    _same(got, _jit(_value_and_grad(make(True)))(*args))
    plain = _jit(_value_and_grad(make(False)))(*args)
    assert not np.array_equal(jax.tree.leaves(got)[-1], jax.tree.leaves(plain)[-1])
    backward = _value_and_grad(autocast(make(False), "bf16"))
    assert set(_dots(lambda *a: backward(*a)[1], *args)) == {"bfloat16"}


def test_grad_inside_gives_the_bits_of_hand_casts():
    def loss(x: Any, w: Any, c: Any) -> Any:
        return jnp.sum(jnp.maximum(x @ w, 0.0) * c)

    def by_hand(x: Any, w: Any, c: Any) -> Any:
        active = _low(x) @ _low(w) > 0
        g = _low(jnp.where(active, c, 0.0))
        return (g @ _low(w).T).astype(F32), (_low(x).T @ g).astype(F32)

    got = _jit(autocast(jax.grad(loss, (0, 1)), "bf16"))(X, W, C)
    _same(got, _jit(by_hand)(X, W, C))


def test_grad_inside_a_rule_that_closes_over_a_tracer():
    for make in (_custom_jvp, _custom_vjp):
        outside = _jit(jax.grad(autocast(make(False), "bf16"), (0, 1)))(X, W, C)
        inside = _jit(autocast(jax.grad(make(False), (0, 1)), "bf16"))(X, W, C)
        for a, b in zip(outside, inside, strict=True):
            np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("fill", [float(np.finfo(np.float32).min), -1e9, np.float32(-1e9), -np.inf])
def test_masks_stay_finite(precision, fill):
    """A number that a low dtype does not hold is clamped; -inf stays what it is."""
    mask = np.tril(np.ones((D, D), bool))
    mask[0] = np.isneginf(fill)  # a row of masked numbers only is uniform, not NaN

    def fn(x: Any, w: Any) -> Any:
        logits = jnp.where(mask, x @ w, fill)
        return logits, jax.nn.softmax(logits)

    logits, p = autocast(fn, precision, restore_dtypes=False)(X[:D], W)
    assert logits.dtype == mpjax.get_precision(precision).rules[-1].policy.compute_dtype
    assert bool(jnp.isfinite(p).all())
    np.testing.assert_allclose(p.sum(-1), 1.0, rtol=1e-5)
    if not np.isneginf(fill):
        np.testing.assert_array_equal(p[0], 1 / D)
        assert bool(jnp.isfinite(logits).all())
    assert float(jnp.abs(jnp.where(mask, 0.0, p)[1:]).max()) == 0.0


@pytest.mark.parametrize(
    "number", [2.0, np.float32(2.0), np.float64(2.0), np.array(2.0, np.float32), 2, np.int32(2)]
)
def test_numbers_never_widen(number):
    def fn(x: Any, w: Any) -> Any:
        y = x @ w
        return y * number + jnp.full_like(y, number) - jnp.where(y > 0, y, number)

    with jax.numpy_dtype_promotion("standard"):
        assert autocast(fn, "bf16", restore_dtypes=False)(X, W).dtype == BF16


def test_arrays_of_float32_widen():
    table = np.ones((1, D), np.float32)
    assert autocast(lambda x, w: x @ w * table, "bf16", restore_dtypes=False)(X, W).dtype == F32


def test_carries_are_stable():
    def fn(x: Any, ws: Any) -> Any:
        def layer(carry: Any, w: Any) -> Any:
            h, total, count = carry
            h = jnp.tanh(h @ w)
            return (h, total + jnp.sum(h), count + 1), h

        return lax.scan(layer, (x, jnp.zeros(()), 0), ws)

    (h, total, count), hs = autocast(fn, "bf16", restore_dtypes=False)(X, WS)
    assert (h.dtype, total.dtype, hs.dtype) == (F32, F32, BF16)
    assert int(count) == L
    made_low = autocast(lambda x, ws: fn(x @ ws[0], ws), "bf16", restore_dtypes=False)
    (h, total, _), _ = made_low(X, WS)
    assert (h.dtype, total.dtype) == (BF16, F32)


def test_no_autocast_leaves_a_region_forward_and_backward():
    keep = no_autocast(lambda h, w: jnp.tanh(h @ w))

    def loss(x: Any, w: Any, v: Any) -> Any:
        return jnp.sum(keep(x @ w, v))

    def by_hand(x: Any, w: Any, v: Any) -> Any:
        return jnp.sum(jnp.tanh((_low(x) @ _low(w)).astype(F32) @ v))

    for outside in (True, False):
        wrap = lambda f: autocast(f, "bf16")  # noqa: E731
        grad = jax.grad(wrap(loss), (0, 1, 2)) if outside else wrap(jax.grad(loss, (0, 1, 2)))
        _same(_jit(grad)(X, W, WS[0]), _jit(jax.grad(by_hand, (0, 1, 2)))(X, W, WS[0]))
        assert _dots(grad, X, W, WS[0]) == {"bfloat16": 3, "float32": 3}


def test_bias_stays_in_the_dtype_of_its_product():
    """As in PyTorch's linear; the sum over tokens of its gradient is in float32."""
    narrow, rows = jnp.ones((1, D)) / 3, 3000

    def fn(x: Any, w: Any, b: Any) -> Any:
        return x @ w + b[None]

    for bias in (C[0], C[0] * 0):
        got = autocast(fn, "bf16", restore_dtypes=False)(X, W, bias)
        _same(got, _low(X) @ _low(W) + _low(bias)[None])
    grad = jax.grad(lambda *a: jnp.mean(autocast(fn, "bf16")(*a) * narrow), 2)
    got = grad(jnp.ones((rows, D)), W, C[0])
    cotangent = float(jnp.asarray(1 / 3 / rows / D, BF16)) * rows
    np.testing.assert_allclose(got, cotangent, rtol=1e-4)


def test_other_additions_to_a_product_widen():
    for fn in (
        lambda x, w, c: x @ w + c,  # a residual
        lambda x, w, c: x[None] @ w + c[None],  # positions
        lambda x, w, c: x[:1] @ w + c[:1],  # a residual of one token
    ):
        assert autocast(fn, "bf16", restore_dtypes=False)(X, W, C).dtype == F32


def _model(x: Any, up: Any, head: Any) -> Any:
    with jax.named_scope("mlp"):
        x = jnp.tanh(x @ up)
    with jax.named_scope("head"):
        return x @ head


def test_rule_leaves_a_path_in_float32():
    def by_hand(x: Any, up: Any, head: Any) -> Any:
        return jnp.tanh((_low(x) @ _low(up)).astype(F32)) @ head

    def grad(f: Callable[..., Any]) -> Callable[..., Any]:
        return jax.value_and_grad(lambda *a: jnp.sum(jnp.square(f(*a))), (0, 1, 2))

    cast_fn = autocast(_model, "bf16", rules=["**/head=fp32"])
    _same(_jit(grad(cast_fn))(X, W, WS[0]), _jit(grad(by_hand))(X, W, WS[0]))
    assert _dots(grad(cast_fn), X, W, WS[0]) == {"bfloat16": 3, "float32": 3}


def test_recipe_rule_is_dot_general_by_hand():
    dims = (((1,), (0,)), ((), ()))

    def by_hand(x: Any, up: Any, head: Any) -> Any:
        y = mpjax.dot_general(_low(x), _low(up), dims, "fp8", preferred_element_type=F32)
        return (_low(jnp.tanh(_low(y))) @ _low(head)).astype(F32)

    def grad(f: Callable[..., Any]) -> Callable[..., Any]:
        return jax.value_and_grad(lambda *a: jnp.sum(f(*a) * C), (0, 1, 2))

    got = _jit(grad(autocast(_model, "bf16", rules=["**/mlp=r=fp8"])))(X, W, WS[0])
    _same(got, _jit(grad(by_hand))(X, W, WS[0]))
    low = _jit(grad(autocast(_model, "bf16")))(X, W, WS[0])
    assert not np.array_equal(got[0], low[0])


def test_casts_are_shared():
    def fn(x: Any, w: Any) -> Any:
        return x @ w + x @ w.T, (x @ w) * 2.0, jnp.exp(x)

    # of x, of w and of w transposed
    assert _casts(autocast(fn, "bf16", restore_dtypes=False), X, W) == {"bfloat16": 3}
    scanned = autocast(lambda x, w: lax.fori_loop(0, 3, lambda _, h: h @ w, x @ w), "bf16",
                       restore_dtypes=False)  # fmt: skip
    assert _casts(scanned, X, W)["bfloat16"] <= 3  # of x, of w, and of w in the body


def test_attention_and_libraries_run_low():
    q, k, v = (_normal(n, 1, 4, 2, 8) for n in range(3))

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    got, plain = jax.jit(lambda *x: (autocast(attend, "bf16")(*x), attend(*x)))(q, k, v)
    np.testing.assert_allclose(got, plain, atol=0.03)
    assert set(_dots(jax.grad(lambda *a: autocast(attend, "bf16")(*a).sum()), q, k, v)) == {
        "bfloat16"
    }
    square = W @ W.T + D * jnp.eye(D)
    for fn in (
        lambda a: jax.scipy.linalg.solve(a, a @ X.T[:, :2]),
        lambda a: jax.scipy.stats.norm.logpdf(a @ a / 100),
        lambda a: jax.scipy.special.logsumexp(a @ a / 10),
        lambda a: jnp.fft.rfft(a @ a).real,
        lambda a: jax.scipy.linalg.cholesky(a, lower=True) @ a,
    ):
        got, plain = jax.jit(lambda x, f=fn: (autocast(f, "bf16")(x), f(x)))(square)
        assert got.dtype == plain.dtype
        np.testing.assert_allclose(got, plain, rtol=0.05, atol=0.05 * float(jnp.abs(plain).max()))


def test_float64_and_integers_are_untouched():
    def fn(x: Any, y: Any, n: Any) -> Any:
        return x @ x, jnp.exp(x), n @ n, x @ y.astype(x.dtype), y @ y

    with jax.enable_x64(True):
        x = jnp.asarray(np.eye(3) * 1.000000001)
        n = jnp.arange(9).reshape(3, 3)
        got = autocast(fn, "bf16", restore_dtypes=False)(x, x.astype(F32), n)
        assert [g.dtype.name for g in got] == [*["float64"] * 2, "int64", "float64", "bfloat16"]
        _same(got[:4], fn(x, x.astype(F32), n)[:4])


def test_what_is_no_array_comes_back_as_it_is():
    def fn(x: Any, config: dict[str, Any], *, flag: bool) -> Any:
        return {"y": x @ x if flag else x, "name": config["name"], "none": None, "n": 3}

    out = autocast(fn, "bf16")(W, {"name": "a"}, flag=True)
    assert (out["name"], out["none"], out["n"], out["y"].dtype) == ("a", None, 3, F32)


def _branching(x: Any) -> Any:
    return x if x.sum() > 0 else -x


def _donated() -> Any:
    x = jnp.ones((2, 2))
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    return autocast(lambda x: x @ x, "bf16")(x)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "not a function": (lambda: autocast(3, "bf16")(X), "3 is not a function"),
    "not traceable": (lambda: autocast(_branching, "bf16")(X), "_branching cannot be traced"),
    "rule without a path": (
        lambda: autocast(_model, "bf16", rules=["**/haed=fp32"])(X, W, W),
        "matches no path .* near misses: .*head",
    ),
    "rule without paths": (
        lambda: autocast(lambda x: x @ x, "bf16", rules=["**/head=fp32"])(W),
        "no module paths; wrap the model with mpjax.named",
    ),
    "conflicting lists": (
        lambda: autocast(_model, "bf16", low=["exp"], full=["exp"]),
        "'exp' stands in low and in full",
    ),
    "unknown name": (
        lambda: autocast(_model, "bf16", full=["sofmax"]),
        "no operation 'sofmax'; did you mean softmax",
    ),
    "one text": (lambda: autocast(_model, "bf16", full="exp"), r"write full=\['exp'\]"),
    "unknown list": (lambda: autocast(_model, "bf16", lists="tpu"), "known: cuda cpu"),
    "unknown dtype": (lambda: autocast(_model, "bf61"), "bf61"),
    "no key": (lambda: autocast(_model, "bf16", key=3), "the random key is 3; write jax.random"),
    "donated": (_donated, r"args\[0\] was donated to an earlier call"),
    "recipe inside a gradient": (
        lambda: jax.eval_shape(
            autocast(jax.grad(lambda *a: _model(*a).sum()), "bf16", rules=["**/mlp=r=fp8"]),
            *(X, W, W),
        ),
        "write jax.grad",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case):
    call, text = BAD[case]
    with pytest.raises(ConfigError, match=text) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
