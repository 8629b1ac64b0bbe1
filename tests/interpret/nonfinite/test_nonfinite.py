"""trace_nonfinite: planted faults are found where they are, clean steps are left in peace."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.interpret.nonfinite.nonfinite import trace_nonfinite
from tests.interpret.nonfinite import planted
from tests.interpret.nonfinite.planted import Fault, clean_step

pytestmark = pytest.mark.usefixtures("fast_compile")

# One for each mechanism that is of its own kind, and each place; all together are evidence.
FAULTS = (
    Fault(planted.half_product, planted.in_remat, "forward"),
    Fault(planted.masked_row, planted.in_jit, "forward"),
    Fault(planted.float8_cast, planted.in_cond, "forward"),
    Fault(planted.exp_overflow, planted.in_shard_map, "forward"),
    Fault(planted.sqrt_at_zero, planted.in_scan, "backward"),
    Fault(planted.untaken_branch, planted.plain, "backward"),
    Fault(planted.half_cotangent, planted.in_custom_vjp, "backward"),
    Fault(planted.power_at_zero, planted.sharded, "backward"),
    Fault(planted.by_hand, planted.in_custom_vjp, "backward"),
    Fault(planted.negative_moment, planted.plain, "optimizer"),
    Fault(planted.no_epsilon, planted.in_while, "optimizer"),
    Fault(planted.half_square, planted.in_scan, "optimizer"),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(fault: Fault) -> None:
    assert fault.misses(trace_nonfinite(fault.step, *fault.arguments())) == []


def test_the_same_step_without_the_fault_is_clean() -> None:
    fault = Fault(planted.half_product, planted.in_scan, "forward")
    assert trace_nonfinite(fault.step, *fault.arguments(broken=False)) is None


@pytest.mark.parametrize("number", [3, 6])
def test_masks_of_minus_infinity_are_no_fault(number: int) -> None:
    step, args = clean_step(number)
    assert trace_nonfinite(step, *args) is None


def test_what_no_output_feels_is_no_fault() -> None:
    dropped = lambda x: jnp.where(x > 0, jnp.log(x), 0)  # noqa: E731
    assert trace_nonfinite(dropped, jnp.zeros(3)) is None
    assert trace_nonfinite(jnp.log, jnp.zeros(3)).primitive == "log"


def test_a_gate_hides_no_fault() -> None:
    """It gives the old state back bit for bit; also where large finite gradients are skipped."""

    def step(w, x):
        with jax.named_scope("net"):
            grad = jax.grad(lambda w: jnp.sum(jnp.exp(w * x)))(w)
        good = jnp.all(jnp.isfinite(grad)) & jnp.all(jnp.abs(grad) < 1e4)
        return jnp.where(good, w - grad, w), 1 - good.astype(jnp.int32)

    w, x = jnp.full(3, 200.0), jnp.ones(3)
    same, skipped = step(w, x)
    assert (same == w).all() and skipped
    report = trace_nonfinite(step, w, x)
    assert (report.primitive, report.path, report.kind) == ("exp", "net", "inf")
    assert trace_nonfinite(step, w / 100, x) is None


def test_the_smallest_cure_is_found_by_trying() -> None:
    def total(x):  # each step of the sum overflows, the sum does not
        with jax.named_scope("sum"):
            return jnp.sum((x * jnp.float16(64)) * jnp.float16(1 / 64))

    x = jnp.full(4, 2048, jnp.float16)
    report = trace_nonfinite(total, x)
    assert (report.primitive, report.kind, report.cure) == ("mul", "inf", "sum in float32")
    assert report.ranges[0].amax == 2048 and report.ranges[0].dtype == "float16"
    text = str(report)
    assert "first inf: mul, forward pass" in text and "cure   sum in float32" in text

    def saturated(x):  # in float32 exp is still infinite, what is made of it not
        large = (x * x).astype(jnp.float32) * 1e-3
        return jnp.sum(large * 0 + 1 / jnp.exp(large))

    assert trace_nonfinite(saturated, x).cure == "all of it in float32"

    def scaled(loss_scale, x):
        return jnp.sum((x * x).astype(jnp.float16) * loss_scale.astype(jnp.float16))

    report = trace_nonfinite(scaled, loss_scale=jnp.float32(2.0**15), x=jnp.ones(8))
    assert report.cure.startswith("a loss scale 2^3 lower: 32768 -> 4096")


def test_nested_loops_give_both_iterations() -> None:
    def outer(carry, ws):
        return jax.lax.scan(lambda c, w: (c / w, None), carry, ws)[0], None

    ws = jnp.ones((3, 4)).at[1, 2].set(0)
    assert trace_nonfinite(lambda x: jax.lax.scan(outer, x, ws)[0], jnp.float32(1)).layer == (1, 2)


def test_a_nan_that_was_given_is_named() -> None:
    report = trace_nonfinite(lambda p: p["w"] * 2, {"w": jnp.array([1, jnp.nan])})
    assert (report.primitive, report.path) == ("argument", "args[0]['w']")
    assert trace_nonfinite(lambda x: jnp.nansum(x), jnp.array([1, jnp.nan])) is None
    beside = lambda x: (x * 2, jnp.where(x > 0, 1 / (x * 0), 0) > 0)  # noqa: E731
    assert trace_nonfinite(beside, jnp.array([0, jnp.nan])).primitive == "argument"


def test_donation_of_the_function_leaves_the_arguments() -> None:
    x = jnp.ones(3)
    step = jax.jit(lambda x: x / 0.0, donate_argnums=0)
    assert trace_nonfinite(step, x).primitive == "div"
    assert np.asarray(x).tolist() == [1, 1, 1]


def test_inside_of_jit_it_says_so() -> None:
    with pytest.raises(ConfigError, match=r"trace_nonfinite: args\[0\] has no value here"):
        jax.jit(lambda x: trace_nonfinite(jnp.log, x))(jnp.ones(2))
