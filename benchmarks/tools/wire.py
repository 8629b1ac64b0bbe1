"""What steps send between chips, compiled without any, and whether wide collectives are found.

Run:       pip install libtpu, the version that `pip install 'jax[tpu]'` takes (480 MB), then
           python -m benchmarks.tools.wire; in the environment of `make verify-gpu`
           python -m benchmarks.tools.wire h100:8
Expected:  no step of three meshes and five precisions sends wider numbers than its Precision says;
           each of the planted wide collectives is named with its dtype, and with its place where
           the compiler has not joined it with others.

Eight chips, a decoder of two blocks, width 512. The planted ones are steps that send wide what
the Precision that they are judged by says is low: by a rule, by a constraint, by the optimizer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.common.page import write
from mpjax.interpret import assert_wire
from mpjax.markdown import table
from mpjax.models import decoder
from mpjax.precision import Precision, get_precision
from mpjax.targets import parse_target, target_devices_of
from mpjax.train import build_abstract, parse_mesh
from mpjax.typing import Settings

TARGET = parse_target(sys.argv[1] if sys.argv[1:] else "v5e:2x4")
MESHES = ("fsdp=8", "data=2,fsdp=4", "fsdp=4,tensor=2")
PRECISIONS = ("bf16", "fp16", "fp8", "pure-bf16", "int8")
SIZES: Settings = dict(layers=2, width=512, heads=4, vocabulary=1024, context=256, loop="unroll")
Loss = Callable[..., Any]


def compiled_step(
    mesh_text: str, precision: str | Precision,
    change: Callable[[Loss, Any], Loss] = lambda loss, mesh: loss,
    optimizer: Callable[[Any], Any] = lambda mesh: optax.adamw(3e-4),
) -> tuple[Any, ...]:  # fmt: skip
    """A step for chips that are not here, and its abstract arguments."""
    mesh = parse_mesh(mesh_text, target_devices_of(TARGET))
    model = decoder("tiny", precision, **SIZES)
    state, step = build_abstract(
        model, optimizer(mesh), mesh, clip=1.0, objective=lambda model: change(model.loss, mesh)
    )
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    batch = {
        name: jax.ShapeDtypeStruct((8, SIZES["context"]), jnp.int32, sharding=rows)
        for name in ("inputs", "targets")
    }
    return step, state, batch


def _whole(x: Any, mesh: Any) -> Any:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def _weights_whole(loss: Loss, mesh: Any) -> Loss:
    """Every weight is gathered as it is stored, before the model casts it."""

    def changed(params: Any, batch: Any, **more: Any) -> Any:
        return loss(jax.tree.map(lambda x: _whole(x, mesh), params), batch, **more)

    return changed


def _moments_whole(mesh: Any) -> Any:
    """Adam whose gradients are brought together on every device."""
    adam = optax.adamw(3e-4)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        return adam.update(jax.tree.map(lambda x: _whole(x, mesh), grads), state, params)

    return optax.GradientTransformation(adam.init, update)


def planted() -> list[tuple[str, tuple[Any, ...], str | Precision, str]]:
    """What is wide, the step, the Precision that it is judged by, and what must be named."""
    low = get_precision("bf16", gradient_dtype="bf16")

    def ruled(rule: str, mesh: str = "fsdp=4,tensor=2") -> tuple[Any, ...]:
        return compiled_step(mesh, get_precision("bf16", rules=[rule]))

    return [
        ("all of it in float32", compiled_step("fsdp=8", "fp32"), "bf16", "mlp/up"),
        ("one MLP in float32", ruled("**/mlp/up=fp32"), "bf16", "mlp/up"),
        ("attention's queries in float32", ruled("**/query=fp32"), "bf16", "attention/query"),
        ("the head in float32", ruled("**/head=fp32"), "bf16", "decoder/head"),
        ("embeddings in float32", ruled("**/embed=fp32"), "bf16", "decoder/embed"),
        ("partial sums of the MLP in float32", ruled("**/down=p=f32,c=bf16,o=f32"), "bf16",
         "mlp/down"),
        ("gradients in float32 where bfloat16 is said", compiled_step("data=2,fsdp=4", "bf16"),
         low, "float32 over data"),
        ("weights gathered before they are cast", compiled_step("fsdp=8", "bf16", _weights_whole),
         "bf16", "all-gather"),
        ("gradients gathered by the optimizer",
         compiled_step("fsdp=8", "bf16", optimizer=_moments_whole), "bf16", "all-gather"),
        ("float16 in float32", compiled_step("fsdp=4,tensor=2", "fp32"), "fp16", "mlp/down"),
    ]  # fmt: skip


def main() -> bool:
    """Compiles all steps and writes the page; whether every bar is met."""
    good, clean, found = True, [], []
    for mesh in MESHES:
        for precision in PRECISIONS:
            try:
                sent, said = assert_wire(*compiled_step(mesh, precision)), "none"
            except AssertionError as error:
                sent, said, good = (), str(error).replace("\n", "<br>"), False
            sizes = [c.bytes * c.times for c in sent if c.kind == "all-gather"]
            summed = [c.bytes * c.times for c in sent if "reduce" in c.kind]
            clean.append([
                mesh, precision, len(sent), f"{sum(sizes) / 1e6:.1f}", f"{sum(summed) / 1e6:.1f}",
                said,
            ])  # fmt: skip
            print(*clean[-1], file=sys.stderr, flush=True)
    for what, step, judge, wanted in planted():
        try:
            assert_wire(*step, precision=judge)
            said, wide, placed = "nothing", False, False
        except AssertionError as error:
            lines = [line.strip() for line in str(error).splitlines()[1:]]
            right = [line for line in lines if wanted in line and "float32" in line]
            said, placed = (right or lines)[0], bool(right)
            wide = any("float32" in line for line in lines)  # of a clean step there is none
        good = good and wide
        yes = {True: "yes", False: "**no**"}
        found.append([what, said, yes[wide], yes[placed]])
        print(*found[-1], file=sys.stderr, flush=True)
    head = ["mesh", "precision", "collectives", "gathered, MB", "reduced, MB", "too wide"]
    body = "\n\n".join([
        (__doc__ or "").split("\n\n")[2], table(head, clean), "## Planted",
        table(["what is wide", "what is said of it", "found", "at its place"], found),
    ])  # fmt: skip
    gpu = TARGET.platform == "gpu"
    kind = "GPUs" if gpu else "TPU chips"
    command = f"python -m benchmarks.tools.wire {TARGET.text}"
    write("wire_gpu" if gpu else "wire", f"What steps send between {kind}", body, command)
    return good


if __name__ == "__main__":
    sys.exit(not main())
