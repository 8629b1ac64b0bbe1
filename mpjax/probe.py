"""What one operation in one number format becomes on this machine's default device.

Everything is found by compiling and running a small program and reading what the compiler made of
it; nothing is looked up. The reading ends at XLA's optimised program. What lies below it shows in
other ways: a TPU program keeps float8 operands that the hardware does not know, and states cycles
that are then no fewer than bfloat16's; a CPU kernel shows in the speed, which is measured too. Run
as a file, this module answers questions from standard input, so that `mpjax.doctor` can put a
compiler that aborts into another process.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

OPS = {
    "storage": "device buffer",
    "elementwise": "x * y",
    "matmul": "x @ y",
    "matmul_wide": "x @ y to float32/int32",
}
HLO_NAMES = {
    "f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16", "s64": "int64",
    "s32": "int32", "s16": "int16", "s8": "int8", "s4": "int4", "u32": "uint32", "u16": "uint16",
    "u8": "uint8", "u4": "uint4", "pred": "bool", "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2", "f4e2m1fn": "float4_e2m1fn",
}  # fmt: skip
_INSTRUCTION = re.compile(r"%?([\w.\-]+) = (\(?)(\w+)\[([\d,]*)\].*?\s([\w\-]+)\((.*)")
_LIBRARY = re.compile(r'custom_call_target="([^"]*(?:matmul|gemm|dot|conv|cublas)[^"]*)"')


class Instruction(NamedTuple):
    """One instruction of an optimised XLA program.

    Args:
      dtype: of its result, in XLA's words; of several the first's.
      shape: of its result.
      several: whether it has several results.
      opcode: such as `dot`.
      operands: their dtypes, `?` where it is not known.
      rest: of the line, behind the opcode.
    """

    dtype: str
    shape: tuple[int, ...]
    several: bool
    opcode: str
    operands: tuple[str, ...]
    rest: str

    @property
    def is_product(self) -> bool:
        """Whether it is a dot, a convolution, or a library's call for one."""
        library = self.opcode == "custom-call" and _LIBRARY.search(self.rest)
        return bool(library) or self.opcode in ("dot", "convolution")


def instructions(hlo: str) -> Iterator[Instruction]:
    r"""Yields the instructions of an optimised XLA program, those of a loop once.

    Args:
      hlo: text of the program, `compiled.as_text()`.

    Example:
      >>> found = instructions("  %a = f32[8,4]{1,0} parameter(0)\n  ROOT %b = f32[8] negate(%a)")
      >>> [(i.opcode, i.operands, i.shape) for i in found]
      [('parameter', (), (8, 4)), ('negate', ('f32',), (8,))]
    """
    dtypes: dict[str, str] = {}
    for line in hlo.splitlines():
        if line.endswith("{"):
            dtypes.clear()  # names are only sure to be unique within one computation
        if not (match := _INSTRUCTION.search(line)):
            continue
        name, several, dtype, shape, opcode, rest = match.groups()
        dtypes[name] = dtype
        names = re.findall(r"%([\w.\-]+)", re.split(r"\)(?:,|$)", rest)[0])
        sizes = tuple(int(size) for size in shape.split(",") if size)
        operands = tuple(dtypes.get(operand, "?") for operand in names)
        yield Instruction(dtype, sizes, bool(several), opcode, operands, rest)


def computed_in(hlo: str, op: str) -> list[tuple[str, ...]]:
    """Read from an optimised XLA program in which formats its products are computed.

    Args:
      hlo: text of the optimised program, `compiled.as_text()`.
      op: `elementwise` (multiplications) or `matmul` (dots, convolutions, library calls).

    Returns:
      For each such instruction the dtype names of its two operands.

    Example:
      >>> computed_in('''ENTRY %main (a: bf16[8,8], b: bf16[8,8]) -> f32[8,8] {
      ...   %a = bf16[8,8]{1,0} parameter(0)
      ...   %b = f32[8,8]{1,0} convert(%a)
      ...   ROOT %dot = f32[8,8]{1,0} dot(%b, %b), lhs_contracting_dims={1}
      ... }''', "matmul")
      [('float32', 'float32')]
    """
    multiplies = op == "elementwise"
    found = instructions(hlo)
    wanted = [i for i in found if (i.opcode == "multiply" if multiplies else i.is_product)]
    names = {**HLO_NAMES, "?": "unknown"}
    return [tuple(names.get(dtype, dtype) for dtype in i.operands[:2]) for i in wanted]


def cycles(hlo: str) -> int:
    """Add up the cycles that the compiler itself estimates; 0 where it states none (CPU, GPU)."""
    return sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', hlo))


def judge(name: str, op: str, hlo: str, bfloat16_hlo: str | None = None) -> dict[str, Any]:
    """Say from a compiled program whether an operation runs in its own format.

    Args:
      name: the dtype that was asked for.
      op: one of `elementwise matmul matmul_wide`.
      hlo: text of its optimised program.
      bfloat16_hlo: text of the same operation's program in bfloat16; needed for a product where
        the compiler states cycles.

    Returns:
      `status` (`native` or `emulated`) and `detail`.
    """
    formats = sorted({dtype for operands in computed_in(hlo, op) for dtype in operands})
    if formats != [name]:
        computed = ", ".join(formats) or "an unknown format"
        return {"status": "emulated", "detail": f"computed in {computed}"}
    if bfloat16_hlo is not None and cycles(hlo) > 0.9 * cycles(bfloat16_hlo) > 0:
        return {"status": "emulated", "detail": "kept, but the compiler expects bfloat16's cycles"}
    return {"status": "native", "detail": f"computed in {name}"}


def _compile(name: str, op: str) -> tuple[Any, tuple[Any, ...]]:
    import jax
    import jax.numpy as jnp

    dtype = jnp.dtype(name)
    n = _size()
    wide = jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32
    functions: dict[str, Callable[..., Any]] = {
        "storage": lambda: jnp.ones((n, n), dtype),
        "elementwise": lambda x, y: x * y,
        "matmul": lambda x, y: jax.lax.dot(x, y),
        "matmul_wide": lambda x, y: jax.lax.dot(x, y, preferred_element_type=wide),
    }
    x = jnp.ones((n, n), dtype)
    operands = () if op == "storage" else (x, x)
    return jax.jit(functions[op]).lower(*operands).compile(), operands


def _size() -> int:
    import jax

    return 512 if jax.default_backend() == "cpu" else 2048  # 2048: long beside a launch


@functools.cache
def _bfloat16_program(op: str) -> str:
    return _compile("bfloat16", op)[0].as_text()


def probe(name: str, op: str) -> dict[str, Any]:
    """Compile and run one operation in one format on the default device.

    Args:
      name: a dtype name, such as `bfloat16`.
      op: one of `storage elementwise matmul matmul_wide`.

    Returns:
      `status` (`native`, `emulated` or `unsupported`), `detail` (why, in a few words) and, for
      products, `gflops` (best of three runs, 10^9 operations a second).

    Example:
      >>> probe("float32", "elementwise")["status"]
      'native'
    """
    import jax
    import jax.numpy as jnp

    product = op.startswith("matmul")
    try:
        compiled, operands = _compile(name, op)
        compiled(*operands).block_until_ready()
        anchor = name in ("float32", "bfloat16") or not product
        bfloat16_hlo = None if anchor else _bfloat16_program(op)
    except (jax.errors.JaxRuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return {"status": "unsupported", "detail": str(error).splitlines()[0]}

    n = _size()
    if op == "storage":
        # Not Array.on_device_size_in_bytes: it counts two 4-bit elements as two bytes.
        taken = compiled.memory_analysis().output_size_in_bytes * 8 / n**2
        info = jnp.iinfo if jnp.issubdtype(name, jnp.integer) else jnp.finfo
        status = "native" if taken == info(name).bits else "emulated"
        return {"status": status, "detail": f"{taken:g} bits"}

    verdict = judge(name, op, compiled.as_text(), bfloat16_hlo)
    if product and name == "float32" and float32_matmul_bits() < 24:
        rounded = f"operands rounded to {float32_matmul_bits()} significant bits"
        verdict = {"status": "emulated", "detail": rounded}
    if product:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            compiled(*operands).block_until_ready()
            seconds.append(time.perf_counter() - start)
        verdict["gflops"] = round(2 * n**3 / min(seconds) / 1e9, 1)
    return verdict


@functools.cache
def float32_matmul_bits() -> int:
    """Count the significant bits of its operands that a float32 matrix product keeps here.

    Multiplies `diag(1 + 2^-k)` by the identity at the default precision: 24 is full float32, 11 is
    TF32, 8 is bfloat16.

    Returns:
      The number of significant bits, the leading one included.

    Example:
      >>> 8 <= float32_matmul_bits() <= 24
      True
    """
    import jax
    import numpy as np

    exact = 1 + np.exp2(-np.arange(1, 129, dtype=np.float32))
    product = jax.jit(jax.numpy.matmul)(np.diag(exact), np.eye(128, dtype=np.float32))
    right = (np.diag(np.asarray(product)) == exact)[:23]
    return 1 + int(np.argmin(right) if not right.all() else 23)


def machine() -> dict[str, Any]:
    """Describe the backend and its devices, or say why JAX cannot start one.

    Returns:
      `backend`, `devices` (kind and memory in bytes, None where the backend does not say) and
      `float32_matmul_bits`; or `error` alone.
    """
    import jax

    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a platform without plugin
        said = (str(error).splitlines() or ["no message"])[0]
        return {"error": f"{said}; unset JAX_PLATFORMS or install the platform's extra"}
    return {
        "backend": jax.default_backend(),
        "devices": [
            {
                "id": device.id,
                "kind": device.device_kind,
                "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
            }
            for device in devices
        ],
        "float32_matmul_bits": float32_matmul_bits(),
        "compile_cache": jax.config.values["jax_compilation_cache_dir"],
    }


def answer(*question: str) -> dict[str, Any]:
    """Answer `("machine",)` with `machine()` and `(format, op)` with `probe(format, op)`."""
    return machine() if question == ("machine",) else probe(*question)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(*line.split())), flush=True)
