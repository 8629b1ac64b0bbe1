"""What autocast costs against the same casts written by hand: nothing in the program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mpjax.interpret import autocast
from tests.interpret.autocast import twins

SIZE = twins.Size(layers=2)
PARAMS, IDS = twins.init(SIZE), twins.batch(SIZE)
PLAIN, TWIN = twins.plain(SIZE), twins.by_hand(SIZE)
AUTO = autocast(PLAIN, "bf16")


@pytest.mark.parametrize("derive", [lambda f: f, jax.grad], ids=["forward", "gradient"])
def test_the_program_has_the_twins_products_and_no_more_casts(derive) -> None:
    ours, theirs = (twins.counts(derive(f), PARAMS, IDS) for f in (AUTO, TWIN))
    assert ours["product of bfloat16"] == theirs["product of bfloat16"] > 0
    assert ours["casts"] <= theirs["casts"]
    assert not ours["product of float32"]
    assert twins.counts(derive(PLAIN), PARAMS, IDS)["product of float32"]


def test_numbers_and_temporaries_are_the_twins() -> None:
    ours, theirs, without = (
        jax.jit(jax.value_and_grad(f)).lower(PARAMS, IDS).compile() for f in (AUTO, TWIN, PLAIN)
    )
    assert (
        ours.memory_analysis().temp_size_in_bytes
        <= 1.02 * theirs.memory_analysis().temp_size_in_bytes
    )
    pairs = [jax.tree.leaves(f(PARAMS, IDS)) for f in (ours, theirs, without)]
    if jax.__version_info__ < (0, 12):  # later ones elide other roundings of the same operations
        assert all(jnp.array_equal(a, b) for a, b in zip(*pairs[:2], strict=True))
    assert not jnp.array_equal(pairs[0][0], pairs[2][0])
    assert all(a.dtype == b.dtype for a, b in zip(pairs[0], pairs[2], strict=True))
