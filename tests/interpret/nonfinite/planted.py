"""Faults to plant: mechanisms, each with one marked line, and the places to plant them in.

A mechanism works on rows (8, 4) and breaks in the rows where `bad` (8, 1) is 1; elsewhere it is
healthy. Its source line is the one that ends in the marker; nothing else is told to the tracer.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MARK = "# planted"
ROWS, WIDTH, LAYERS = 8, 4, 4
BAD_ROW, BAD_LAYER = 5, 2
F16 = jnp.float16


def wide(bad: Any) -> Any:
    return jnp.broadcast_to(bad, (bad.shape[0], WIDTH))


# forward: bad where the number that goes in is


def exp_overflow(x: Any, bad: Any) -> Any:
    v = x + wide(bad) * 200
    y = jnp.exp(v)  # planted
    return y


def log_of_zero(x: Any, bad: Any) -> Any:
    v = x * (1 - wide(bad))
    y = jnp.log(v)  # planted
    return y


def zero_by_zero(x: Any, bad: Any) -> Any:
    v = x * (1 - wide(bad))
    y = v / v  # planted
    return y


def half_product(x: Any, bad: Any) -> Any:
    v = (x * (1 + wide(bad) * 1e4)).astype(F16)
    w = jnp.full((WIDTH, WIDTH), 4, F16)
    y = v @ w  # planted
    return y.astype(jnp.float32)


def half_sum(x: Any, bad: Any) -> Any:
    v = (x * (1 + wide(bad) * 3e4)).astype(F16)
    y = v + v + v  # planted
    return y.astype(jnp.float32)


def half_cast(x: Any, bad: Any) -> Any:
    v = x * (1 + wide(bad) * 1e6)
    y = v.astype(F16)  # planted
    return y.astype(jnp.float32)


def float8_cast(x: Any, bad: Any) -> Any:
    v = x * (1 + wide(bad) * 1e3)
    y = v.astype(jnp.float8_e4m3fn)  # planted
    return y.astype(jnp.float32)


def zero_variance(x: Any, bad: Any) -> Any:
    v = x * (1 - wide(bad))
    mean = jnp.mean(v * v, axis=1, keepdims=True)
    y = jax.lax.rsqrt(mean)  # planted
    return v * jnp.broadcast_to(y, v.shape)


def sqrt_negative(x: Any, bad: Any) -> Any:
    v = x - 5 * wide(bad)
    y = jnp.sqrt(v)  # planted
    return y


def masked_row(x: Any, bad: Any) -> Any:
    keep = jnp.concatenate([jnp.zeros_like(x[:, 1:]), 1 - x[:, :1] * 0 - bad], axis=1)
    scores = jnp.where(keep > 0, x, -jnp.inf)
    top = lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))
    y = scores - jnp.broadcast_to(top, scores.shape)  # planted
    return jnp.exp(y)


def negative_power(x: Any, bad: Any) -> Any:
    v = x * (1 - wide(bad))
    y = v**-2  # planted
    return y


# backward: the value is finite, its derivative is not


def sqrt_at_zero(x: Any, bad: Any) -> Any:
    v = x * (1 - wide(bad))
    y = jnp.sqrt(v)  # planted
    return y


def untaken_branch(x: Any, bad: Any) -> Any:
    v = x * (1 - wide(bad))
    y = jnp.log(v)  # planted
    return jnp.where(v > 0, y, 0)


def power_at_zero(x: Any, bad: Any) -> Any:
    v = x * (1 - wide(bad))
    y = v**0.25  # planted
    return y


def norm_at_zero(x: Any, bad: Any) -> Any:
    v = x * (1 - wide(bad))
    y = jnp.linalg.norm(v, axis=1, keepdims=True)  # planted
    return jnp.broadcast_to(y, v.shape)


def half_cotangent(x: Any, bad: Any) -> Any:
    h = (x * 1e-3).astype(F16)
    y = h.astype(jnp.float32)  # planted
    return y * (1 + wide(bad) * 1e6)


def half_gradient(x: Any, bad: Any) -> Any:
    h = (x * 1e-3).astype(F16)
    y = h * (1 + wide(bad) * 300).astype(F16)  # planted
    return (y * F16(300)).astype(jnp.float32)


def arcsine_at_one(x: Any, bad: Any) -> Any:
    v = x / 2 + wide(bad) * (1 - x / 2)
    y = jnp.arcsin(v)  # planted
    return y


def by_hand(x: Any, bad: Any) -> Any:
    # JAX gives all equations of a backward rule the line of the call that it belongs to.
    y = _by_hand(x, wide(bad))  # planted
    return y


@jax.custom_vjp
def _by_hand(x: Any, bad: Any) -> Any:
    return x


def _by_hand_backward(bad: Any, ct: Any) -> Any:
    return ct / (1 - bad), jnp.zeros_like(bad)


_by_hand.defvjp(lambda x, bad: (x, bad), _by_hand_backward)

# optimizer: of gradients g, where there is more than one operand


def negative_moment(g: Any, bad: Any) -> Any:
    moment = g * g - wide(bad) * 10
    out = g * lax.rsqrt(moment + 1e-8)  # planted
    return out


def no_epsilon(g: Any, bad: Any) -> Any:
    g = g * (1 - wide(bad))
    root = jnp.sqrt(g * g)
    out = g / root  # planted
    return out


def half_square(g: Any, bad: Any) -> Any:
    h = (g * (1 + wide(bad) * 1e3)).astype(F16)
    out = h * h  # planted
    return out.astype(jnp.float32)


def half_weight(g: Any, bad: Any) -> Any:
    new = g * (1 + wide(bad) * 1e6)
    out = new.astype(F16)  # planted
    return out.astype(jnp.float32)


FORWARD = (
    exp_overflow, log_of_zero, zero_by_zero, half_product, half_sum, half_cast, float8_cast,
    zero_variance, sqrt_negative, masked_row, negative_power,
)  # fmt: skip
BACKWARD = (
    sqrt_at_zero, untaken_branch, power_at_zero, norm_at_zero, half_cotangent, half_gradient,
    arcsine_at_one, by_hand,
)  # fmt: skip
OPTIMIZER = (negative_moment, no_epsilon, half_square, half_weight)


def planted_line(mechanism: Callable[..., Any]) -> int:
    """The number of the marked line."""
    lines, start = inspect.getsourcelines(mechanism)
    (index,) = [i for i, line in enumerate(lines) if line.rstrip().endswith(MARK)]
    return start + index


# places: (op, x, bads of all layers) -> y


def _scoped(op: Any, x: Any, bad: Any) -> Any:
    with jax.named_scope("block"), jax.named_scope("op"):
        return op(x, bad)


def plain(op: Any, x: Any, bads: Any) -> Any:
    return _scoped(op, x, bads[BAD_LAYER])


def in_jit(op: Any, x: Any, bads: Any) -> Any:
    return jax.jit(lambda x, bad: _scoped(op, x, bad))(x, bads[BAD_LAYER])


def in_scan(op: Any, x: Any, bads: Any) -> Any:
    return lax.scan(lambda c, bad: (c, _scoped(op, c, bad)), x, bads)[1]


def in_remat(op: Any, x: Any, bads: Any) -> Any:
    body = jax.checkpoint(lambda c, bad: (c, _scoped(op, c, bad)))
    return lax.scan(body, x, bads)[1]


def in_cond(op: Any, x: Any, bads: Any) -> Any:
    def layer(c: Any, bad: Any) -> Any:
        with jax.named_scope("block"):
            y = lax.cond(jnp.sum(bad) > 0, lambda x: _op(op, x, bad), lambda x: x, c)
        return c, y

    return lax.scan(layer, x, bads)[1]


def _op(op: Any, x: Any, bad: Any) -> Any:
    with jax.named_scope("op"):
        return op(x, bad)


def in_while(op: Any, x: Any, bads: Any) -> Any:
    def body(state: Any) -> Any:
        i, total = state
        return i + 1, total + _scoped(op, x, bads[i])

    return lax.while_loop(lambda state: state[0] < LAYERS, body, (0, x * 0))[1]


def in_custom_vjp(op: Any, x: Any, bads: Any) -> Any:
    """The rule is JAX's own gradient of the operation."""

    @jax.custom_vjp
    def rule(x: Any, bad: Any) -> Any:
        return _scoped(op, x, bad)

    def forward(x: Any, bad: Any) -> Any:
        y, pull = jax.vjp(lambda x: _scoped(op, x, bad), x)
        return y, (pull, bad)

    def backward(saved: Any, ct: Any) -> Any:
        pull, bad = saved
        return pull(ct)[0], jnp.zeros_like(bad)

    rule.defvjp(forward, backward)
    return rule(x, bads[BAD_LAYER])


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:ROWS]), ("rows",))


def in_shard_map(op: Any, x: Any, bads: Any) -> Any:
    spec = PartitionSpec("rows")
    run = jax.shard_map(
        lambda x, bad: _scoped(op, x, bad), mesh=_mesh(), in_specs=(spec, spec), out_specs=spec
    )
    return run(x, bads[BAD_LAYER])


def sharded(op: Any, x: Any, bads: Any) -> Any:
    return in_scan(op, x, bads)  # `arguments` spreads the rows over the devices


PLACES = (
    plain, in_jit, in_scan, in_remat, in_cond, in_while, in_custom_vjp, in_shard_map, sharded,
)  # fmt: skip
LOOPS = (in_scan, in_remat, in_cond, in_while, sharded)


@dataclasses.dataclass(frozen=True)
class Fault:
    """One planted fault, and what has to be found."""

    mechanism: Callable[..., Any]
    place: Callable[..., Any]
    direction: str

    @property
    def name(self) -> str:
        return f"{self.direction}-{self.mechanism.__name__}-{self.place.__name__}"

    @property
    def path(self) -> str:
        return "optimizer/block/op" if self.direction == "optimizer" else "net/block/op"

    @property
    def layer(self) -> int | None:
        return BAD_LAYER if self.place in LOOPS else None

    @property
    def shard(self) -> tuple[int, ...] | None:
        return (BAD_ROW,) if self.place in (in_shard_map, sharded) else None

    def arguments(self, *, broken: bool = True) -> tuple[Any, Any]:
        x = np.linspace(0.5, 1.5, ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
        bads = np.zeros((LAYERS, ROWS, 1), np.float32)
        if broken:
            bads[BAD_LAYER, BAD_ROW] = 1
        if self.place is not sharded:
            return jnp.asarray(x), jnp.asarray(bads)
        mesh = _mesh()
        put = lambda v, *spec: jax.device_put(v, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
        return put(x, "rows"), put(bads, None, "rows")

    def step(self, x: Any, bads: Any) -> Any:
        """Value, gradient and update of x, as a train step has them."""

        def loss(x: Any) -> Any:
            with jax.named_scope("net"):
                if self.direction == "optimizer":
                    return jnp.sum(x * x)
                if self.place is in_while:
                    return jnp.sum(x * x) + jnp.sum(lax.stop_gradient(y))
                return jnp.sum(self.place(self.mechanism, x, bads))

        if self.direction == "forward" and self.place is in_while:
            with jax.named_scope("net"):  # no derivative goes through a while loop
                y = self.place(self.mechanism, x, bads)
        value, grad = jax.value_and_grad(loss)(x)
        if self.direction != "optimizer":
            return value, x - 0.1 * grad
        with jax.named_scope("optimizer"):
            update = self.place(self.mechanism, grad, bads)
        return value, x, update

    def misses(self, report: Any) -> list[str]:
        """What of a report is wrong."""
        if report is None:
            return ["nothing reported"]
        file, line = report.line.split(" (")[0].rsplit(":", 1)
        found = {
            "path": (report.path, self.path),
            "layer": (report.layer, self.layer),
            "direction": (report.direction, self.direction),
            "line": (int(line), planted_line(self.mechanism)),
            "file": (file, inspect.getsourcefile(self.mechanism)),
            "shard": (report.shard, self.shard),
        }
        return [f"{key} {got!r}, not {want!r}" for key, (got, want) in found.items() if got != want]


def grid() -> Iterator[Fault]:
    """All mechanisms in all places where they can be."""
    for mechanism in FORWARD:
        for place in PLACES:
            yield Fault(mechanism, place, "forward")
    for mechanism in BACKWARD:
        for place in PLACES:
            if place is not in_while:
                yield Fault(mechanism, place, "backward")
    for mechanism in OPTIMIZER:
        for place in PLACES:
            yield Fault(mechanism, place, "optimizer")


# steps with nothing wrong in them, full of masks


def clean_step(number: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A train step of an attention with -inf masks, one of many, and its arguments."""
    dtype = (jnp.float32, jnp.bfloat16, jnp.float16)[number % 3]
    by_hand, loop, guard = number % 2 == 0, number % 4 >= 2, number % 5

    def layer(x: Any, w: Any) -> Any:
        with jax.named_scope("attention"):
            scores = (x @ w) @ x.T
            mask = jnp.tril(jnp.ones(scores.shape, jnp.bool_))
            scores = jnp.where(mask, scores, -jnp.inf).astype(jnp.float32)
            if by_hand:
                top = lax.stop_gradient(jnp.max(scores, axis=1, keepdims=True))
                weights = jnp.exp(scores - jnp.broadcast_to(top, scores.shape))
                total = jnp.sum(weights, axis=1, keepdims=True)
                weights = weights / jnp.broadcast_to(total, weights.shape)
            else:
                weights = jnp.exp(jax.nn.log_softmax(scores, axis=1))
            y = weights.astype(x.dtype) @ x
        return (x + y) * dtype(0.5), None

    def loss(ws: Any, x: Any) -> Any:
        if loop:
            x = lax.scan(jax.checkpoint(layer), x, ws)[0]
        else:
            x = layer(layer(x, ws[0])[0], ws[1])[0]
        x = x.astype(jnp.float32)
        top = jnp.max(x, axis=1, where=x > 0, initial=-jnp.inf)
        extra = jnp.where(top > -jnp.inf, top, 0)
        if guard == 1:  # the branch of log(0) is dropped, before its derivative sees it
            extra = extra + jnp.where(extra > 0, jnp.log(jnp.where(extra > 0, extra, 1)), 0)
        return jnp.sum(x * x) + jnp.sum(jnp.where(jnp.isfinite(extra), extra, 0))

    def step(ws: Any, x: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(ws, x)
        norm = jnp.sqrt(jnp.sum(jnp.square(grads.astype(jnp.float32))))
        norm = norm * float(guard != 3)
        factor = jnp.minimum(jnp.float32(1), 1 / norm)  # 1 / 0 where there is no gradient
        return value, ws - (grads.astype(jnp.float32) * factor).astype(ws.dtype)

    rng = np.random.default_rng(number)
    ws = jnp.asarray(rng.normal(size=(2, WIDTH, WIDTH)), dtype)
    return step, (ws, jnp.asarray(rng.normal(size=(6, WIDTH)), dtype))
