"""Planted leaks are found by cause and source line, and clean models have none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mpjax.errors import ConfigError
from mpjax.interpret import no_autocast
from mpjax.interpret.audit.audit import assert_low_precision, audit
from tests.interpret.audit.clean import CLEAN
from tests.interpret.audit.leaky import LOW, PLANTS, B, D, T, W, X, line_of, softmax, wide

pytestmark = pytest.mark.usefixtures("fast_compile", "mixing")

FORWARD = [name for name, plant in PLANTS.items() if not plant.gradient]


@pytest.fixture
def mixing() -> Iterator[None]:
    """Mixed dtypes promote, as they do for users; under strict promotion nothing could leak."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def gradient(fn: Any) -> Any:
    def loss(weights: Any, *data: Any) -> Any:
        return jnp.sum(fn(weights, *data).astype(jnp.float32))

    return jax.grad(loss)


def check(fn: Any, name: str) -> None:
    plant = PLANTS[name]
    report = audit(fn, plant.weights, *plant.data)
    found = {(leak.mechanism, leak.line.split(" ")[0]) for leak in report.leaks}
    assert found == {(plant.mechanism, line_of(name))}, str(report)
    reached = sum(leak.flops for leak in report.leaks)
    wide_flops = sum(p.flops for p in report.products if "float32" in p.operands)
    assert reached >= wide_flops > 0  # every wide product is explained


def test_there_are_enough_plants() -> None:
    assert len(FORWARD) >= 25
    assert len({PLANTS[name].mechanism for name in FORWARD}) >= 8
    assert len({PLANTS[name].mechanism for name in PLANTS}) >= 9
    assert len(CLEAN) >= 5


@pytest.mark.parametrize("name", FORWARD)
def test_a_leak_is_found_at_its_line(name: str) -> None:
    check(PLANTS[name].fn, name)


@pytest.mark.parametrize("name", ["scan_carry", "rope_table"])
def test_a_leak_names_the_line_that_made_what_was_wide(name: str) -> None:
    (leak,) = audit(PLANTS[name].fn, PLANTS[name].weights, *PLANTS[name].data).leaks
    assert f"made by the function at {line_of(name, 'origin')} " in leak.origin


def late_in_a_scan(w: Any, x: Any) -> Any:
    def cell(carry: Any, x_BD: Any) -> Any:
        y = jnp.tanh(carry) @ w
        return x_BD.astype(jnp.float32), y.astype(LOW)

    return lax.scan(cell, x[:, 0].astype(jnp.float32), jnp.swapaxes(x, 0, 1))[1]


def late_in_a_while(w: Any, x: Any) -> Any:
    def body(carry: Any) -> Any:
        wide, h = carry
        h = (jnp.tanh(wide) @ w).astype(LOW)
        return h.astype(jnp.float32), h

    start = x.astype(jnp.float32), x
    return lax.while_loop(lambda carry: carry[1][0, 0, 0] > 0, body, start)[1]


@pytest.mark.parametrize("model", [late_in_a_scan, late_in_a_while])
def test_what_a_loop_makes_wide_at_its_end_is_wide_at_its_start(model: Any) -> None:
    leaks = audit(model, W, X).leaks
    assert [leak.mechanism for leak in leaks] == ["cast", "cast"]
    assert len({leak.line for leak in leaks}) == 2  # before the loop, and at its end


@pytest.mark.parametrize("name", PLANTS)
def test_a_gradient_leaks_where_its_function_does(name: str) -> None:
    check(gradient(PLANTS[name].fn), name)


@pytest.mark.parametrize("name", ["constant_array", "forgetful_norm", "LinenDense", "wide_scores"])
@pytest.mark.parametrize("around", [jax.jit, jax.checkpoint])
def test_what_is_around_a_leak_does_not_hide_it(name: str, around: Any) -> None:
    check(gradient(around(PLANTS[name].fn)), name)


@pytest.mark.parametrize("name", [name for name in PLANTS if PLANTS[name].gradient])
def test_some_leak_in_the_gradient_only(name: str) -> None:
    plant = PLANTS[name]
    assert audit(plant.fn, plant.weights, *plant.data).leaks == ()
    (leak,) = audit(gradient(plant.fn), plant.weights, *plant.data).leaks
    assert leak.direction == "backward"


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_model_has_no_leak(name: str) -> None:
    fn, args = CLEAN[name]()
    report = audit(fn, *args)
    assert report.leaks == report.minor == ()
    assert report.share(report.low) == 1.0
    assert len(report.products) > 3
    assert_low_precision(fn, *args)


def test_a_cured_leak_is_gone() -> None:
    table = np.ones(D, np.float32)

    def model(w: Any, x: Any, cast: bool) -> Any:
        h = x @ w
        return (h * (jnp.asarray(table, LOW) if cast else table)) @ w

    (leak,) = audit(lambda w, x: model(w, x, False), W, X).leaks
    assert "jnp.asarray(constant, x.dtype)" in leak.remedy
    assert audit(lambda w, x: model(w, x, True), W, X).leaks == ()


def test_a_float32_program_says_that_it_is_one() -> None:
    report = audit(gradient(lambda w, x: jnp.tanh(x @ w) @ w), wide(D, D), wide(B, T, D))
    assert report.leaks == report.minor == ()
    assert "no low product: product FLOPs 100.0% float32" in str(report)
    with pytest.raises(AssertionError, match="no low product: all 5 products run in float32"):
        assert_low_precision(gradient(lambda w, x: jnp.tanh(x @ w) @ w), wide(D, D), wide(B, T, D))


def test_a_program_may_have_lost_all_of_its_low_products() -> None:
    report = audit(lambda w, x: (x * np.ones(D, np.float32)) @ w.astype(jnp.float32), W, X)
    assert (report.low, report.share("float32")) == ("bfloat16", 1.0)
    assert {leak.mechanism for leak in report.leaks} == {"constant"}


def test_wide_sums_are_no_leak_until_they_feed_a_product() -> None:
    def model(w: Any, x: Any) -> Any:
        y = jnp.einsum("btd,df->btf", x, w, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(y)

    report = audit(model, W, X)
    assert report.leaks == ()
    assert [(p.operands, p.accumulation) for p in report.products] == [
        (("bfloat16", "bfloat16"), "float32")
    ]


def test_integer_products_are_none() -> None:
    def model(w: Any, x: Any) -> Any:
        q = jnp.round(x).astype(jnp.int8)
        total = lax.dot_general(q, q, (((2,), (2,)), ((0,), (0,))), preferred_element_type="int32")
        return x @ w, total

    report = audit(model, W, X)
    assert len(report.products) == 1
    assert report.leaks == ()


def test_angles_are_minor() -> None:
    def model(w: Any, x: Any) -> Any:
        angle = jnp.outer(jnp.arange(T, dtype=jnp.float32), jnp.linspace(0, 1, D))
        angle = jnp.einsum("t,d->td", angle[:, 1], angle[1])
        x = x * jnp.cos(angle).astype(x.dtype)
        return softmax(jnp.einsum("btd,bsd->bts", x @ w, x @ w))

    report = audit(model, W, X)
    assert report.leaks == ()
    assert [leak.mechanism for leak in report.minor] == ["inputs"]
    assert "Minor leaks" in str(report)
    assert_low_precision(model, W, X)


def test_a_small_leak_is_minor_and_a_larger_one_is_not() -> None:
    def model(w: Any, x: Any, router: Any) -> Any:
        for _ in range(8):
            x = x @ w
        return x, x @ router

    big = jax.ShapeDtypeStruct((512, 512), LOW), jax.ShapeDtypeStruct((64, 512), LOW)
    for width, minor in ((2, 1), (64, 0)):
        report = audit(model, *big, wide(512, width))
        assert (len(report.leaks), len(report.minor)) == (1 - minor, minor)


def test_a_region_that_asks_for_float32_is_no_leak() -> None:
    def head(x: Any, w: Any) -> Any:
        return x.astype(jnp.float32) @ w.astype(jnp.float32)

    assert len(audit(lambda w, x: head(x @ w, w), W, X).leaks) == 1
    assert audit(lambda w, x: no_autocast(head)(x @ w, w), W, X).leaks == ()


def two_paths(w: Any, x: Any) -> Any:
    with jax.named_scope("decoder"):
        with jax.named_scope("mlp"):
            x = x @ w
        with jax.named_scope("head"):
            return x.astype(jnp.float32) @ w.astype(jnp.float32)


def test_allowed_paths_may_be_wide() -> None:
    assert_low_precision(two_paths, W, X, allow=["decoder/head"])
    assert_low_precision(two_paths, W, X, allow=["**/head"])
    with pytest.raises(AssertionError, match=r"test_leaks.py:\d+ .*decoder/head") as caught:
        assert_low_precision(two_paths, W, X, allow=["decoder/mlp"])
    assert ".astype(bfloat16)" in str(caught.value)


def test_a_pattern_that_matches_nothing_names_near_misses() -> None:
    with pytest.raises(ConfigError, match=r"'decoder/haed' matches no path.*\*\*/head"):
        assert_low_precision(two_paths, W, X, allow=["decoder/haed"])
    with pytest.raises(ConfigError, match="it has no module paths.*named_scope"):
        assert_low_precision(lambda x: x @ x, W, allow=["head"])
    with pytest.raises(ConfigError, match=r"write allow=\['head'\]"):
        assert_low_precision(lambda x: x @ x, W, allow="head")
