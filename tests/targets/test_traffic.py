"""Bytes to and from memory: against programs that are counted by hand, and the compiler's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mpjax.targets.traffic import Program

LOOP = """
%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %y = f32[8,8]{1,0} negate(%x)
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%i, %y)
}
%condition (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}
ENTRY %main (a: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %a = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[8,8]{1,0}) while(%a), condition=%condition, body=%body, TRIPS
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')
FUSION = """
%part (p0: f32[32,8,8], p1: s32[]) -> f32[8,8] {
  %p0 = f32[32,8,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,8}
  ROOT %b = f32[8,8]{1,0} bitcast(%slice)
}
%store (p0: f32[32,8,8], p1: f32[1,8,8], p2: s32[]) -> f32[32,8,8] {
  %p0 = f32[32,8,8]{2,1,0} parameter(0)
  %p1 = f32[1,8,8]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = f32[32,8,8]{2,1,0} dynamic-update-slice(%p0, %p1, %p2, %zero, %zero)
}
ENTRY %main (a: f32[32,8,8], i: s32[]) -> f32[8,8] {
  %a = f32[32,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[8,8]{1,0:T(8,128)S(1)} fusion(%a, %i), kind=kLoop, calls=%part
  %two = f32[1,8,8]{2,1,0} copy(%one)
  ROOT %three = f32[32,8,8]{2,1,0} fusion(%a, %two, %i), kind=kLoop, calls=%store
}
"""


def test_a_loop_counts_as_often_as_it_runs() -> None:
    assert Program(LOOP).bytes() == 5 * 2 * 256  # an array is read and written


def test_of_what_is_sliced_or_updated_the_part_counts() -> None:
    # one: a slice is read; its result lies on the chip, so is neither written nor read again.
    # two: written. three: two and i are read, the part is written in place. i twice.
    assert Program(FUSION).bytes() == 256 + 256 + 2 * 256 + 2 * 4


def test_scanned_layers_have_the_bytes_of_unrolled_ones() -> None:
    weights, x = jnp.ones((8, 256, 256)), jnp.ones((64, 256))

    def scanned(weights, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

    def unrolled(weights, x):
        for at in range(8):
            x = jnp.tanh(x @ weights[at])
        return x

    loop, flat = (jax.jit(f).lower(weights, x).compile() for f in (scanned, unrolled))
    one, other = Program(loop.as_text()).bytes(), Program(flat.as_text()).bytes()
    assert 0.8 < one / other < 1.4
    # Control: the compiler's own figure has the body once.
    once = loop.cost_analysis()["bytes accessed"]
    assert once < 0.5 * one


def test_without_loops_it_is_near_the_compilers_own_figure() -> None:
    x = jnp.ones((256, 512))

    def f(x, w):
        return jnp.sum(jnp.tanh(x @ w) @ w.T, axis=0)

    compiled = jax.jit(f).lower(x, jnp.ones((512, 256))).compile()
    own = compiled.cost_analysis()["bytes accessed"]
    assert 0.8 < Program(compiled.as_text()).bytes() / own < 1.25


def test_the_largest_arrays_are_named() -> None:
    found = Program(FUSION).largest(2)
    assert found == ((32 * 256, "float32[32,8,8]", ""), (256, "float32[1,8,8]", ""))
