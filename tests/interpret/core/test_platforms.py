"""Calls that depend on the platform: tools look at the branch that runs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import mpjax
from mpjax.errors import ConfigError
from mpjax.interpret.core.platforms import branch_taken, check_platform

pytestmark = pytest.mark.usefixtures("fast_compile")


def test_the_platform_is_the_one_where_jax_runs() -> None:
    assert check_platform("audit", None) == "cpu"
    assert jax.jit(lambda x: x + len(check_platform("audit", None)))(0) == 3  # in a trace too
    with pytest.raises(ConfigError, match="audit: platform='cud'; known: cpu cuda rocm tpu"):
        check_platform("audit", "cud")


@pytest.mark.parametrize("wrap", [lambda f: f, jax.vmap, jax.grad], ids=["plain", "vmap", "grad"])
def test_the_branch_is_the_one_that_jax_lowers(wrap: Any) -> None:
    """The constants in the lowered text tell which branch it is."""

    def fn(x: Any) -> Any:
        return lax.platform_dependent(
            x, tpu=lambda x: x * 3.5, cuda=lambda x: x * 4.5, default=lambda x: x * 5.5
        )

    wrapped, x = wrap(fn), jnp.ones((2,) if wrap is jax.vmap else ())
    jaxpr = jax.make_jaxpr(wrapped)(x).jaxpr
    *_, cond = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "cond"]
    for platform, constant in (("tpu", "3.5"), ("cuda", "4.5"), ("rocm", "5.5"), ("cpu", "5.5")):
        number = branch_taken(cond, platform)
        assert number is not None
        text = jax.jit(wrapped).trace(x).lower(lowering_platforms=(platform,)).as_text()
        lowered = f"{float(constant):e}".replace("e+0", "e+0") in text
        assert lowered and constant in str(cond.params["branches"][number])
    switch = jax.make_jaxpr(lambda i, x: lax.switch(i, [jnp.sin, jnp.cos], x))(0, x[..., None])
    (plain,) = [eqn for eqn in switch.jaxpr.eqns if eqn.primitive.name == "cond"]
    assert branch_taken(plain, "cpu") is None


def test_monitor_measures_the_branch_that_runs() -> None:
    """Operands of an fp8 product are scaled to the largest number of e4m3, 448."""

    def loss(params: Any, x: Any) -> Any:
        with jax.named_scope("mlp"):
            numbers = (((1,), (0,)), ((), ()))
            return jnp.sum(mpjax.dot_general(x, params["w"], numbers, recipe="fp8"))

    params, x = {"w": jnp.ones((8, 4))}, jnp.full((4, 8), 2.0)
    look = mpjax.monitor(loss, what=["activations"], formats=["e4m3"])
    _, stats = jax.jit(look)(params, x)
    found = {name: float(s.amax) for name, s in stats.activations.items()}
    assert (found["mlp:lhs"], found["mlp:rhs"]) == (448.0, 448.0)
    assert found["mlp:product"] == 8 * 448.0**2
