"""Which kernels a train step runs on an H100, read from XLA's GPU compiler, without a GPU.

Run:       make verify-gpu        (its own .venv-gpu: 6 GB, once)
Expected:  under `fp8` every linear product of the blocks, forward and backward, is cuBLASLt's FP8
           kernel; under `bf16` no product is float32 and attention is cuDNN's fused kernel; the
           controls show what each of these checks looks like when it does not hold.

XLA compiles for the GPU that `mpjax/targets/data/h100.txtpb` describes. Triton's kernels are off,
because choosing them needs a GPU to time them on, and so is the merging of products with a common
operand (query, key and value into one), so that every product can be counted.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections import Counter
from typing import Any
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"

import jax
import jax.numpy as jnp
import optax
from jax.experimental.topologies import get_topology_desc
from jax.sharding import SingleDeviceSharding

from benchmarks.common.page import write
from benchmarks.gpu.hlo import FLOAT8, Product, fused_attention, products
from mpjax.markdown import table
from mpjax.models import decoder
from mpjax.optim import wrap
from mpjax.precision import get_precision
from mpjax.targets import read_chip
from mpjax.train.step import init_state, make_train_step

L, D, H, F, V, B, T = 4, 256, 4, 704, 4096, 8, 256  # head width 64; all multiples of 16
LINEARS = {
    "attention/query": (D, D), "attention/key": (D, D), "attention/value": (D, D),
    "attention/out": (D, D), "mlp/gate": (D, F), "mlp/up": (D, F), "mlp/down": (F, D),
}  # fmt: skip
WAYS = ("fprop", "dgrad", "wgrad")
OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_dot_merger_threshold_mb": 0,
}
# label -> preset, its rules, kernel of attention
ARMS: dict[str, tuple[str, list[str], str]] = {
    "bf16": ("bf16", [], "auto"),
    "fp8": ("fp8", [], "auto"),
    "fp32 (control)": ("fp32", [], "auto"),
    "bf16, kernel=xla (control)": ("bf16", [], "xla"),
    "fp8, mlp/down in bf16 (control)": ("fp8", ["**/mlp/down=bf16"], "auto"),
}


def compiled(preset: str, rules: list[str], kernel: str, device: Any) -> str:
    """The optimised HLO of a decoder's train step on one GPU."""
    model = decoder(
        "tiny", get_precision(preset, rules=rules), layers=L, width=D, heads=H, mlp_width=F,
        vocabulary=V, context=T, kernel=kernel, loop="unroll",
    )  # fmt: skip
    optimizer = wrap(optax.adamw(1e-3), model.precision, clip=1.0)
    step = make_train_step(model.loss, optimizer)
    state = jax.eval_shape(lambda: init_state(model.init(jax.random.key(0)), optimizer))
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    there = SingleDeviceSharding(device)
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there),
        (state, {"inputs": ids, "targets": ids}),
    )
    # The host has no GPU, so what is chosen by the host's backend is told that it is one.
    with mock.patch("jax.default_backend", return_value="gpu"):
        lowered = jax.jit(step.function, donate_argnums=0).lower(*args)
    text = lowered.compile(compiler_options=OPTIONS).as_text()
    assert text is not None
    return text


def role(product: Product) -> tuple[str, str] | None:
    """Of a product of the blocks: which linear, and fprop, dgrad or wgrad; None for the head."""
    for name, kernel in LINEARS.items():
        if f"/{name}/" in product.path:
            backward = "transpose(" in product.path
            tokens = product.shape[0] == B * T
            assert tokens or (backward and product.shape == kernel), product
            return name, ("dgrad" if tokens else "wgrad") if backward else "fprop"
    return None


def main() -> bool:
    """Compiles all arms and writes the page; whether all claims hold."""
    topology = get_topology_desc(
        "1x1x8", platform="cuda", target_config=read_chip("h100").description,
        topology="1x1x8",
    )  # fmt: skip
    device: Any = topology.devices[0]
    eight: dict[str, Counter[Any]] = {}
    rows, texts = [], {}
    for label, (preset, rules, kernel) in ARMS.items():
        text = compiled(preset, rules, kernel, device)
        found = products(text)
        eight[label] = Counter(role(p) for p in found if p.kernel == FLOAT8)
        dtypes = Counter(f"{p.dtypes[0]} x {p.dtypes[1]}" for p in found)
        wide = sum("f32" in p.dtypes or "f64" in p.dtypes for p in found)
        forward, backward = fused_attention(text)
        texts[label] = (found, wide, (forward, backward))
        rows.append(
            (
                label, len(found), sum(eight[label].values()), wide, f"{forward} + {backward}",
                ", ".join(f"{n} {k}" for k, n in sorted(dtypes.items())),
            )
        )  # fmt: skip
        print(rows[-1], flush=True)

    everything = {(name, way): L for name in LINEARS for way in WAYS}
    without = {key: n for key, n in everything.items() if key[0] != "mlp/down"}
    low, wide_low, fused = texts["bf16"]
    claims = {
        f"fp8: all {L} x {len(LINEARS)} x 3 = {sum(everything.values())} products of the blocks'"
        " linears are " + f"`{FLOAT8}`": eight["fp8"] == everything,
        "fp8: and the head's three are not": len(texts["fp8"][0]) == sum(everything.values()) + 3,
        f"fp8, control: with mlp/down in bf16 by a rule, {3 * L} fewer are": (
            eight["fp8, mlp/down in bf16 (control)"] == without
        ),
        "bf16, control: none is": not eight["bf16"],
        "bf16: no product is float32": wide_low == 0 and len(low) == sum(everything.values()) + 3,
        "fp32, control: all products are": texts["fp32 (control)"][1]
        == len(texts["fp32 (control)"][0]),
        f"bf16: attention is cuDNN's fused kernel, {L} forward and {L} backward": fused == (L, L),
        "bf16, kernel=xla, control: none is, and there are more products": (
            texts["bf16, kernel=xla (control)"][2] == (0, 0)
            and len(texts["bf16, kernel=xla (control)"][0]) > len(low)
        ),
    }
    each = [(name, *(eight["fp8"][name, way] for way in WAYS)) for name in LINEARS]
    cuda = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax-cuda12-plugin", "nvidia-cudnn-cu12", "nvidia-cublas-cu12")
    ]
    options = ", ".join(f"{k}={v}" for k, v in OPTIONS.items())
    parts = [
        f"The train step (AdamW, clip, gate) of a decoder with L={L}, width {D}, {H} heads of"
        f" {D // H}, MLP {F}, vocabulary {V}, batch {B} x {T}, compiled for {device.device_kind} by"
        f" XLA's GPU compiler, on a host without a GPU: {', '.join(cuda)}; compiler options"
        f" {options}. Nothing has run on a GPU: this shows which kernels are called, not how fast"
        " they are.",
        table(("claim", "holds"), [(k, "yes" if v else "NO") for k, v in claims.items()]),
        f'All matrix products of the step, by arm; "float8" are calls of `{FLOAT8}`, "float32" have'
        ' a float32 operand, "fused" are cuDNN\'s attention kernels forward + backward.',
        table(("arm", "products", "float8", "float32", "fused", "operands"), rows),
        f"Under `fp8`, calls of the FP8 kernel by linear ({L} layers):",
        table(("linear", *WAYS), each),
    ]
    body = "\n\n".join(parts)
    write("gpu", "Kernels on an H100", body, command="make verify-gpu")
    return all(claims.values())


if __name__ == "__main__":
    sys.exit(not main())
