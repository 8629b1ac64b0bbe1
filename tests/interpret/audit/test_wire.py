"""What is read of the collectives of a program, and what a step may send."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.errors import ConfigError
from mpjax.interpret import assert_wire, audit
from mpjax.interpret.audit.collectives import Collective, collectives
from mpjax.interpret.audit.wire import SMALL, allowed_bits
from mpjax.models import decoder
from mpjax.precision import get_precision
from mpjax.tasks import Distillation, Language
from mpjax.train import build

pytestmark = pytest.mark.usefixtures("fast_compile")
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
PROGRAM = Path(__file__).with_name("collectives.hlo").read_text()


def test_every_form_of_groups_and_results_is_read() -> None:
    found = {(c.kind, c.dtype): c for c in collectives(PROGRAM, MESH)}
    assert len(found) == len(collectives(PROGRAM, MESH)) - 1  # two gathers of bfloat16
    first, *_ = [c for c in collectives(PROGRAM, MESH) if c.kind == "all-gather"]
    assert first == Collective(
        "all-gather", "bfloat16", 32, 64, "fsdp", "decoder/layers/3/mlp/up", "backward", 1
    )
    assert found["reduce-scatter", "float32"] == Collective(
        "reduce-scatter", "float32", 16, 64, "data", "", "", 1
    )
    whole = found["all-reduce", "float32"]
    assert (whole.elements, whole.axes, whole.path) == (4, "data,fsdp,tensor", "")
    assert whole.direction == "backward"
    looped = found["all-reduce", "bfloat16"]
    assert (looped.times, looped.axes, looped.path) == (12, "tensor", "a/mlp/down")
    counted = found["all-reduce", "float64"]
    assert (counted.times, counted.axes) == (5, "data")
    assert found["collective-permute", "int8"].axes == "tensor"
    assert found["all-to-all", "uint32"].axes == "?" == collectives(PROGRAM, MESH)[-1].axes


def test_a_mesh_transposed_in_its_devices_is_read() -> None:
    line = (
        "  %g = f32[4] all-gather(%a), channel_id=1,"
        " replica_groups=mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}, dimensions={0}"
    )
    # devices 0 2 4 6 and 1 3 5 7: all but the last axis
    (one,) = collectives("ENTRY %main (a: f32[1]) -> f32[4] {\n" + line + "\n}", MESH)
    assert one.axes == "data,fsdp"


def test_what_slices_of_tpus_exchange_is_read_in_the_program_of_one() -> None:
    said = (
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = f"""ENTRY %main (a: f32[1]) -> f32[4] {{
  %g = bf16[8,4]{{1,0}} all-gather(%a), channel_id=1, replica_groups={{{{0,1}},{{2,3}}}}
  %send = (f32[16,8]{{1,0}}, u32[], token[]) send(%x, %t), is_host_transfer=true, {said}
  %recv = (f32[16,8]{{1,0}}, u32[], token[]) recv(%t), is_host_transfer=true, {said}
}}"""
    inside, between = collectives(text, MESH)  # two slices of four
    assert (inside.kind, inside.axes) == ("all-gather", "tensor")
    assert (between.kind, between.dtype, between.bytes) == ("all-reduce", "float32", 512)
    assert between.axes == "slices"


def test_a_reduction_that_a_gpu_starts_names_its_wholes_and_its_parts() -> None:
    line = (
        "  %s = ((f32[32,8]{1,0}, f32[8,8]{1,0}), (f32[16,8]{1,0}, f32[4,8]{1,0}))"
        " reduce-scatter-start(%a, %b), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}"
    )
    (one,) = collectives("ENTRY %main (a: f32[1]) -> f32[4] {\n" + line + "\n}", MESH)
    assert (one.elements, one.bytes, one.axes) == (32 * 8 + 8 * 8, 4 * 40 * 8, "tensor")


@pytest.mark.parametrize(
    ("changes", "precision", "bits"),
    [
        ({}, "bf16", 16),
        ({}, "fp32", 32),
        ({"path": "decoder/layers/3/mlp/up"}, "bf16", 16),
        ({"path": "decoder/head"}, "bf16", 16),
        ({"path": "decoder/head", "kind": "all-reduce", "axes": "tensor"}, "bf16", 32),  # o=f32
        ({"path": ""}, "bf16", 16),
        ({"kind": "all-reduce", "axes": "tensor"}, "bf16", 16),
        ({"kind": "all-reduce", "axes": "tensor", "path": ""}, "bf16", 32),
        ({"kind": "reduce-scatter", "direction": "backward"}, "bf16", 32),
        ({"kind": "reduce-scatter", "direction": "backward"}, "bf16:gradient_dtype=bf16", 16),
        ({"kind": "all-reduce", "axes": "data,fsdp", "direction": ""}, "bf16", 32),
        ({"kind": "all-reduce", "direction": "forward"}, "bf16", 16),
        ({"elements": SMALL}, "bf16", None),
        ({"dtype": "int32"}, "bf16", None),
    ],
)
def test_a_collective_may_be_as_wide_as_its_policy(
    changes: dict[str, Any], precision: str, bits: int | None
) -> None:
    fields: dict[str, Any] = dict(
        kind="all-gather", dtype="float32", elements=SMALL + 1, bytes=0, axes="fsdp",
        path="decoder/layers/mlp/up", direction="forward", times=1,
    )  # fmt: skip
    found = get_precision("bf16", gradient_dtype="bf16") if ":" in precision else precision
    assert allowed_bits(Collective(**fields | changes), get_precision(found)) == bits


class Compiled:
    """Stands for a step that was compiled for devices which are not here: its program's text."""

    def __init__(self, text: str, platform: str = "tpu", precision: str = "bf16") -> None:
        devices = np.array([SimpleNamespace(platform=platform)] * 8).reshape(2, 2, 2)
        self.mesh = SimpleNamespace(devices=devices, shape=MESH)
        self.optimizer = SimpleNamespace(precision=get_precision(precision))
        self.compiled = self
        self._text = text

    def lower(self, *args: Any) -> Compiled:
        return self

    def compile(self) -> Compiled:
        return self

    def as_text(self) -> str:
        return self._text


def test_wide_collectives_are_named_and_can_be_allowed() -> None:
    assert len(assert_wire(Compiled(PROGRAM))) == 8, "all are small"
    wide = PROGRAM.replace("bf16[2,8]", "f32[2,8000]").replace("bf16[4,8]", "f32[4,8000]")
    with pytest.raises(AssertionError) as error:
        assert_wire(Compiled(wide))
    first, line = str(error.value).splitlines()
    assert first == "1 collective is too wide:"
    assert line.strip() == (
        "all-gather of 32,000 float32 over fsdp at decoder/layers/3/mlp/up (backward); bf16 says"
        " 16 bits: cast the array to the compute dtype before it is gathered"
    )
    assert_wire(Compiled(wide), allow=["**/mlp/up"])
    assert_wire(Compiled(wide), precision="fp32")
    with pytest.raises(AssertionError, match="1 collective "):
        assert_wire(Compiled(wide), allow=["**/mlp/down"])


@pytest.mark.parametrize(
    ("step", "more", "said"),
    [
        (len, {}, "is no step; give one of mpjax.train.build"),
        (Compiled(PROGRAM, "cpu"), {}, "compiler of a CPU sends bfloat16 as float32"),
        (Compiled(PROGRAM), {"allow": "**/up"}, "is one text; write"),
        (Compiled(PROGRAM), {"precision": "bf61"}, "bf61"),
    ],
)
def test_wrong_calls_are_one_line(step: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        assert_wire(step, **more)
    assert "\n" not in str(error.value)


def test_a_precision_goes_by_its_name() -> None:
    with pytest.raises(ConfigError, match="'bf16' is no argument of the step; write precision="):
        assert_wire(Compiled(PROGRAM), {}, {}, "bf16")


def test_an_audit_lists_what_a_step_sends() -> None:
    model = decoder("tiny", "fp32", layers=1, width=16, heads=2, vocabulary=32, context=8)
    state, step = build(model, optax.sgd(1e-2), "fsdp=2,tensor=2,data=2")
    ids = jnp.zeros((4, 8), jnp.int32)
    report = audit(step, state, {"inputs": ids, "targets": ids}, compiled=True)
    assert report.compiled is not None and report.products
    sent = report.compiled.collectives
    assert {c.axes for c in sent} >= {"fsdp", "tensor"} and "?" not in {
        c.axes for c in sent if c.kind != "collective-permute"
    }
    assert any(c.path.endswith("mlp/up") and c.kind == "all-gather" for c in sent)
    assert "Sent between devices" in str(report)
    json = report.to_dict()["compiled"]["collectives"]
    assert len(json) == len(sent) and json[0]["kind"] == sent[0].kind
    assert jax.tree.leaves(state.params)[0].shape, "nothing was run or donated"


def test_a_step_that_reads_frozen_arrays_is_audited() -> None:
    model = decoder("tiny", "fp32", layers=1, width=16, heads=2, vocabulary=32, context=8)
    teacher = Distillation(Language(), model, model.init(jax.random.key(1)))
    state, step = build(model, optax.sgd(1e-2), objective=teacher.objective)
    ids = jnp.zeros((4, 8), jnp.int32)
    batch = {"inputs": ids, "targets": ids}
    alone = audit(build(model, optax.sgd(1e-2))[1], state, batch)
    assert audit(step, state, batch).flops > 1.2 * alone.flops, "the teacher's products too"
