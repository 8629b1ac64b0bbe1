"""The reading of compiled programs: ones compiled here, and excerpts of TPU and GPU ones."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from mpjax import probe

# Excerpts of what the TPU compiler makes of `x @ y` to float32, 2048 x 2048 (libtpu 0.0.52).
TPU = """\
%fused_computation (param_0: {t}[2048,2048], param_1: {t}[2048,2048]) -> f32[2048,2048] {{
  %param_0 = {t}[2048,2048]{{1,0:T(8,128)(2,1)S(1)}} parameter(0)
  %fusion.1 = {t}[2048,2048]{{1,0:T(8,128)(2,1)}} fusion(%param_0), kind=kLoop, calls=%bitcast_fusion
  %param_1 = {t}[2048,2048]{{1,0:T(8,128)(2,1)}} parameter(1)
  %fusion.2 = {t}[2048,2048]{{1,0:T(8,128)(2,1)}} fusion(%param_1), kind=kLoop, calls=%bitcast_fusion.1
  ROOT %convolution.1 = f32[2048,2048]{{1,0:T(8,128)}} convolution(%fusion.1, %fusion.2), dim_labels=bf_io->bf
}}
ENTRY %main.1 (x.1: {t}[2048,2048], y.1: {t}[2048,2048]) -> f32[2048,2048] {{
  %y.1 = {t}[2048,2048]{{1,0:T(8,128)(2,1)}} parameter(1), sharding={{replicated}}
  ROOT %fusion = f32[2048,2048]{{1,0:T(8,128)}} fusion(%copy-done, %y.1), kind=kOutput, calls=%fused_computation, backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}
}}
"""  # noqa: E501
# The shape of a cuBLASLt float8 call and of a float16 one, with a tuple result and a work space.
GPU = """\
ENTRY %main.1 (x.1: {t}[16,16], y.1: {t}[16,16]) -> f32[16,16] {{
  %x.1 = {t}[16,16]{{1,0}} parameter(0)
  %y.1 = {t}[16,16]{{1,0}} parameter(1)
  %wide = f16[16,16]{{1,0}} convert(%x.1)
  %one = f32[] constant(1)
  %call = (f32[16,16]{{1,0}}, s8[33554432]{{0}}) custom-call({operands}, %one, %one), custom_call_target="{target}"
}}
"""  # noqa: E501


def _program(name: str, op: str, n: int = 64) -> str:
    x = jnp.ones((n, n), name)
    wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32

    def function(x: jax.Array, y: jax.Array) -> jax.Array:
        if op == "elementwise":
            return x * y
        return jax.lax.dot(x, y, preferred_element_type=wide if op == "matmul_wide" else None)

    return jax.jit(function).lower(x, x).compile().as_text()


def _product_line(hlo: str) -> tuple[str, list[str]]:
    """The only dot's operand types, by its computation's header, not as `computed_in` does."""
    computation = next(c for c in hlo.split("\n\n") if re.search(r"\sdot\(", c))
    header = next(line for line in computation.splitlines() if line.endswith("{"))
    return header, re.findall(r": (\w+)\[", header)


@pytest.mark.parametrize("op", ["matmul", "matmul_wide"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16", "float8_e5m2", "int8"])
def test_status_agrees_with_an_independent_reading_of_the_program(name: str, op: str) -> None:
    hlo = _program(name, op)
    short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float8_e5m2": "f8e5m2"}
    header, operands = _product_line(hlo)
    assert len(operands) == 2, header
    kept = operands == [short.get(name, "s8")] * 2
    assert probe.judge(name, op, hlo)["status"] == ("native" if kept else "emulated")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what XLA's CPU backend does")
def test_cpu_multiplies_bfloat16_in_float32() -> None:
    hlo = _program("bfloat16", "elementwise")
    assert re.search(r"f32\[64,64\]\S* convert\(", hlo)
    assert re.search(r"= f32\[64,64\]\S* multiply\(", hlo)
    assert probe.computed_in(hlo, "elementwise") == [("float32", "float32")]
    assert probe.probe("bfloat16", "elementwise") == {
        "status": "emulated",
        "detail": "computed in float32",
    }
    assert probe.probe("float32", "elementwise")["status"] == "native"


def test_a_tpu_program_that_keeps_float8_is_native_only_where_it_costs_less() -> None:
    bfloat16 = TPU.format(t="bf16", cycles=141966)
    assert probe.computed_in(bfloat16, "matmul") == [("bfloat16", "bfloat16")]
    assert probe.judge("bfloat16", "matmul_wide", bfloat16)["status"] == "native"
    as_bfloat16 = TPU.format(t="f8e4m3fn", cycles=141966)  # v5e, which has no float8
    assert probe.judge("float8_e4m3fn", "matmul_wide", as_bfloat16, bfloat16) == {
        "status": "emulated",
        "detail": "kept, but the compiler expects bfloat16's cycles",
    }
    int8 = TPU.format(t="s8", cycles=79888)  # v5e
    assert probe.judge("int8", "matmul_wide", int8, bfloat16)["status"] == "native"


def test_a_gpu_library_call_is_read_by_its_operands() -> None:
    f8 = GPU.format(t="f8e4m3fn", operands="%x.1, %y.1", target="__cublas$lt$matmul$f8")
    assert probe.judge("float8_e4m3fn", "matmul_wide", f8)["status"] == "native"
    wide = GPU.format(t="f8e4m3fn", operands="%wide, %wide", target="__cublas$gemm")
    assert probe.judge("float8_e4m3fn", "matmul_wide", wide)["detail"] == "computed in float16"
    other = GPU.format(t="f8e4m3fn", operands="%x.1, %y.1", target="Sharding")
    assert probe.judge("float8_e4m3fn", "matmul_wide", other)["status"] == "emulated"


def test_names_are_looked_up_within_their_computation() -> None:
    hlo = """\
%first (p: f32[2,2]) -> f32[2,2] {
  %p = f32[2,2]{1,0} parameter(0)
}
ENTRY %main (q: bf16[2,2]) -> bf16[2,2] {
  ROOT %d = bf16[2,2]{1,0} dot(%p, %p), lhs_contracting_dims={1}
}"""
    assert probe.computed_in(hlo, "matmul") == [("unknown", "unknown")]


def test_storage_counts_packed_bits() -> None:
    assert probe.probe("int8", "storage") == {"status": "native", "detail": "8 bits"}
    bits = {probe.probe(name, "storage")["detail"] for name in ("int4", "float4_e2m1fn")}
    assert bits <= {"4 bits", "8 bits"}
    if jax.default_backend() == "cpu":
        assert bits == {"4 bits"}


def test_what_does_not_compile_is_unsupported_and_says_why() -> None:
    for name in ("int8", "int4"):
        try:
            _program(name, "matmul_wide")
        except jax.errors.JaxRuntimeError as error:
            why = str(error).splitlines()[0][:40]
            verdict = probe.probe(name, "matmul_wide")
            assert verdict["status"] == "unsupported" and verdict["detail"].startswith(why)
        else:
            assert probe.probe(name, "matmul_wide")["status"] != "unsupported"
    assert probe.probe("float32", "matmul_wide")["status"] != "unsupported"
    assert probe.probe("no_such_dtype", "storage")["status"] == "unsupported"


def test_float32_bits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    probe.float32_matmul_bits.cache_clear()
    matmul = jnp.matmul

    def through_bfloat16(x: jax.Array, y: jax.Array) -> jax.Array:
        narrow = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return matmul(narrow, y)

    assert probe.float32_matmul_bits() == 24 or jax.default_backend() != "cpu"
    probe.float32_matmul_bits.cache_clear()
    monkeypatch.setattr(jnp, "matmul", through_bfloat16)
    assert probe.float32_matmul_bits() == 8
    probe.float32_matmul_bits.cache_clear()
