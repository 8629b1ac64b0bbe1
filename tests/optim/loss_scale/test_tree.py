"""Loss scales as pytrees and as arithmetic: no setting is lost, nothing overflows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import PartitionSpec

from mpjax.errors import ConfigError
from mpjax.optim import (
    DynamicLossScale,
    LeafLossScale,
    LogMaxLossScale,
    LossScale,
    NoOpLossScale,
    StaticLossScale,
    make_loss_scale,
    scaled_value_and_grad,
)

pytestmark = pytest.mark.usefixtures("fast_compile")

SCALES = {
    "none": NoOpLossScale(),
    "static": StaticLossScale(2.0**10),
    "dynamic": DynamicLossScale(2.0**5, 3.0, 0.25, 7, 3, 2.0**-3, 2.0**9),
    "logmax": LogMaxLossScale("e5m2", 3.0, 0.9, 2.0**5, 3.0, 0.25, 7, 2.0**-3, 2.0**9, False),
    "leaf": LeafLossScale(["a", "**"], 2.0**5, 3.0, 0.25, 7, 3, 2.0**-3, 2.0**9),
}
GRADS = {"a": jnp.array([2.0**9, 1.0]), "b": jnp.array([0.25])}


def moved(scale: LossScale) -> LossScale:
    """After steps that leave every part of a dynamic state off its start."""
    for finite in (True, False, True, True):
        bad = jnp.where(jnp.bool_(finite), 0, jnp.nan)
        scale = scale.adjust(jnp.bool_(finite), GRADS | {"b": GRADS["b"] + bad})
    return scale


@pytest.mark.parametrize("name", SCALES)
def test_jit_keeps_every_setting_and_state(name: str) -> None:
    scale = moved(SCALES[name])
    out = jax.jit(lambda s: s)(scale)
    assert type(out) is type(scale)
    assert out.settings == scale.settings
    assert [x.tolist() for x in out.state] == [x.tolist() for x in scale.state]
    assert jax.tree.structure(out) == jax.tree.structure(scale)


def test_jmp_loses_its_floor_in_jit_and_we_do_not() -> None:
    floor = jnp.float32(16.0)
    theirs = jmp.DynamicLossScale(jnp.float32(32.0), jnp.int32(0), min_loss_scale=floor)
    assert jax.jit(lambda s: s)(theirs).min_loss_scale == 1.0
    ours = jax.jit(lambda s: s)(DynamicLossScale(32.0, min_scale=16.0))
    for _ in range(3):
        ours = ours.adjust(jnp.bool_(False))
    assert ours.value == 16.0


@pytest.mark.parametrize("name", SCALES)
def test_any_leaf_may_take_the_place_of_an_array(name: str) -> None:
    scale = SCALES[name]
    specs = jax.tree.map(lambda _: PartitionSpec(), scale)
    assert type(specs) is type(scale) and specs.settings == scale.settings
    assert all(spec == PartitionSpec() for spec in specs.state)
    count = {"none": 0, "static": 1, "dynamic": 3, "logmax": 6, "leaf": 3}[name]
    assert len(specs.state) == count
    shapes = jax.eval_shape(lambda s: s.adjust(jnp.bool_(True), GRADS), scale)
    assert shapes.settings == scale.settings
    assert [x.dtype for x in shapes.state] == [x.dtype for x in scale.state]
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(scale)]
    assert paths == [f".{name}" for name in scale.names] and len(set(paths)) == count


def test_donation_takes_the_old_state_and_keeps_the_settings() -> None:
    old = moved(DynamicLossScale(2.0**5, hysteresis=3))
    expected = [x.item() for x in old.adjust(jnp.bool_(True)).state]
    new = jax.jit(lambda s, f: s.adjust(f), donate_argnums=0)(old, jnp.bool_(True))
    assert all(x.is_deleted() for x in old.state)
    assert [x.item() for x in new.state] == expected
    assert new.settings == old.settings


@pytest.mark.parametrize("name", ["static", "dynamic", "logmax", "leaf"])
def test_orbax_restores_the_state_into_the_settings_of_its_target(
    name: str, tmp_path: Path
) -> None:
    scale = moved(SCALES[name])
    fresh = SCALES[name]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "scale", {"scale": scale})
        checkpointer.wait_until_finished()
        out = checkpointer.restore(tmp_path / "scale", jax.eval_shape(lambda: {"scale": fresh}))
    assert [x.tolist() for x in out["scale"].state] == [x.tolist() for x in scale.state]
    assert out["scale"].settings == scale.settings
    if name != "static":
        assert [x.tolist() for x in fresh.state] != [x.tolist() for x in scale.state]
        nexts = [s.adjust(jnp.bool_(False), GRADS).state for s in (out["scale"], scale)]
        assert [x.tolist() for x in nexts[0]] == [x.tolist() for x in nexts[1]]


def test_a_float16_loss_is_scaled_in_float32() -> None:
    loss = jnp.float16(60000.0)
    for scale in (StaticLossScale(2.0**16), DynamicLossScale(2.0**16)):
        assert scale.scale(loss) == 60000.0 * 2.0**16
        assert scale.scale(loss).dtype == jnp.float32
    # The control: jmp multiplies by a weak Python scale in float16.
    assert jnp.isinf(jmp.StaticLossScale(2.0**15).scale(loss))


def test_unscale_is_exact_for_powers_of_two_and_float32() -> None:
    rng = np.random.default_rng(0)
    grads = rng.normal(size=64).astype(np.float32)
    tree = {"w": jnp.asarray(grads), "h": jnp.asarray(grads, jnp.float16)}
    out = DynamicLossScale(2.0**10).unscale(tree)
    assert np.array_equal(out["w"], grads / np.float32(2.0**10))
    assert np.array_equal(out["h"], grads.astype(np.float16).astype(np.float32) * 2.0**-10)
    assert {x.dtype.name for x in jax.tree.leaves(out)} == {"float32"}
    # The control: the same division in float16 rounds.
    half = grads.astype(np.float16)
    assert (half / np.float16(2.0**15) != half.astype(np.float32) / np.float32(2.0**15)).any()


def test_no_scale_only_casts() -> None:
    tree = {"h": jnp.float16(3.0), "n": jnp.int32(3)}
    for out in (NoOpLossScale().scale(tree), NoOpLossScale().unscale(tree)):
        assert out["h"] == 3.0 and out["h"].dtype == jnp.float32
        assert out["n"].dtype == jnp.int32
    assert NoOpLossScale().value == 1.0


def test_a_fresh_scale_of_any_kind_can_be_donated() -> None:
    """Its arrays are apart: one buffer twice cannot be."""
    for scale in SCALES.values():
        fresh = make_loss_scale(scale.settings, GRADS)
        out = jax.jit(lambda s: s.adjust(jnp.bool_(True), GRADS), donate_argnums=0)(fresh)
        assert out.settings == scale.settings


@pytest.mark.parametrize(
    ("scale", "minimum"),
    [
        (NoOpLossScale(), True),
        (StaticLossScale(8.0), True),
        (DynamicLossScale(8.0), False),
        (DynamicLossScale(0.1, min_scale=0.1), True),  # 0.1 is no float32
    ],
)
def test_at_minimum_is_where_the_scale_can_no_longer_fall(scale: LossScale, minimum: bool) -> None:
    assert bool(scale.at_minimum()) is minimum
    assert bool(scale.adjust(jnp.bool_(False)).value == scale.value) is minimum


def test_make_loss_scale_gives_the_kind_and_all_settings() -> None:
    for scale in SCALES.values():
        made = make_loss_scale(scale.settings, GRADS)
        assert type(made) is type(scale) and made.settings == scale.settings
        assert [x.tolist() for x in made.state] == [x.tolist() for x in scale.state]


def test_a_bad_setting_is_refused_where_it_is_given() -> None:
    with pytest.raises(ConfigError, match="init=-1 is not a positive"):
        StaticLossScale(-1)
    with pytest.raises(ConfigError, match="max=1e"):
        DynamicLossScale(max_scale=1e39)


def test_a_loss_scale_of_ones_own_needs_three_methods() -> None:
    """The protocol is open: scale, unscale and adjust on any pytree."""

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Halving:
        value: Any

        def scale(self, tree: Any) -> Any:
            return jax.tree.map(lambda x: x.astype(jnp.float32) * self.value, tree)

        def unscale(self, tree: Any) -> Any:
            return jax.tree.map(lambda x: x.astype(jnp.float32) / self.value, tree)

        def adjust(self, finite: Any) -> Halving:
            return Halving(self.value / 2)

    fn = jax.jit(scaled_value_and_grad(lambda w: jnp.sum(w * w)))
    loss, grads, finite = fn(Halving(jnp.float32(8.0)), jnp.ones(2, jnp.float16))
    assert (loss.item(), grads.tolist(), finite.item()) == (2.0, [2.0, 2.0], True)
