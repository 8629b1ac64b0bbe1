"""A loss in chunks on several devices: nothing is sent within the loop over the chunks."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mpjax.interpret.audit.collectives import Collective, collectives
from mpjax.models import decoder, recurrent, seq2seq
from mpjax.models.core import network
from mpjax.optim import wrap
from mpjax.precision import get_precision
from mpjax.train import parse_mesh
from mpjax.train.sharding import ShardActivations, state_shardings
from mpjax.train.step import init_state, make_train_step

pytestmark = pytest.mark.usefixtures("fast_compile")
B, T = 8, 12
MESHES = ["data=2,fsdp=2,tensor=2", "fsdp=8", "data=8"]
SMALL = dict(layers=1, width=16, vocabulary=64, loss_chunk=4)
MODELS = {
    "untied": lambda: decoder("tiny", heads=2, tied=False, head_bias=True, **SMALL),
    "tied": lambda: decoder("tiny", heads=2, tied=True, **SMALL),
    "recurrent": lambda: recurrent("tiny", **SMALL),
    "seq2seq": lambda: seq2seq("seq2seq-tiny", heads=2, **SMALL),
}


def batch() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    ids = {name: rng.integers(1, 64, (B, T)).astype(np.int32)
           for name in ("inputs", "targets", "source")}  # fmt: skip
    return ids | {"weights": rng.random((B, T)).astype(np.float32)}


def loss_of(model: Any) -> Any:
    return lambda params, read: model.loss(params, read)[0]


def compiled(
    model: Any, mesh: Any, read: dict[str, Any]
) -> tuple[Any, Any, tuple[Collective, ...]]:
    """Loss and gradients on a mesh, and what their program sends."""
    params = model.init(jax.random.key(0))
    state = init_state(params, wrap(optax.sgd(0.1), model.precision))
    placed = jax.device_put(params, state_shardings(state, model.axes, mesh).params)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    program = jax.jit(jax.value_and_grad(loss_of(model.sharded(ShardActivations(mesh))))).lower(
        placed, jax.device_put(read, rows)
    ).compile()  # fmt: skip
    found = program(placed, jax.device_put(read, rows))
    return *jax.device_get(found), collectives(program.as_text(), dict(mesh.shape))


def in_loops(sent: tuple[Collective, ...]) -> list[Collective]:
    return [one for one in sent if one.times > 1 and one.elements > B * T]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", MESHES)
def test_loss_and_gradients_are_those_of_one_device(name: str, text: str) -> None:
    model, mesh = MODELS[name](), parse_mesh(text)
    read = {k: x for k, x in batch().items() if name == "seq2seq" or k != "source"}
    want, right = jax.jit(jax.value_and_grad(loss_of(model)))(model.init(jax.random.key(0)), read)
    loss, gradients, sent = compiled(model, mesh, read)
    assert abs(loss - want) < 2e-6 * abs(want)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * float(jnp.abs(theirs).max() + 1e-3))
    # over `tensor` a chunk's sums and gradients go; they are of that chunk's tokens
    heads = [one for one in in_loops(sent) if one.path.endswith("head")]
    assert all(one.axes == "tensor" for one in heads), heads


def test_the_control_sends_the_head_in_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mesh = MODELS["untied"](), parse_mesh("fsdp=8")
    read = {k: x for k, x in batch().items() if k != "source"}
    assert not in_loops(compiled(model, mesh, read)[2])
    monkeypatch.setattr(
        network.NextToken, "_apart",
        lambda self, p, x, parts, key: (x, lambda x: self._unembed(p, x, key)),
    )  # fmt: skip
    sent = in_loops(compiled(model, mesh, read)[2])
    # the kernel, alone or put together with the bias
    assert {one.elements for one in sent} & {16 * 64, 16 * 64 + 64}
    assert {one.times for one in sent} == {T // 4}


def test_chunks_are_of_what_one_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the largest chunk of a pod's batch would be a single token."""
    asked: list[tuple[int, ...]] = []
    real = network.ops.chunk_length
    monkeypatch.setattr(
        network.ops, "chunk_length", lambda *sizes: asked.append(sizes) or real(*sizes)
    )
    model = MODELS["tied"]()
    tokens = {"inputs": jnp.zeros((B, T), jnp.int32), "targets": jnp.zeros((B, T), jnp.int32)}
    for text, rows in (("", 1), ("fsdp=4,tensor=2", 2), ("tensor=8", 8)):
        sharded = model.sharded(ShardActivations(parse_mesh(text)))
        jax.eval_shape(sharded.loss, jax.eval_shape(model.init, jax.random.key(0)), tokens)
        assert asked.pop()[:2] == (rows, T)


@pytest.mark.parametrize("precision", ["pure-bf16", "fp16", "head in fp8"])
def test_a_step_of_any_precision_runs(precision: str) -> None:
    rules = ["**/head=r=fp8"] if precision == "head in fp8" else []  # which is not copied
    chosen = get_precision("fp32" if rules else precision, rules=rules)
    model = decoder("tiny", chosen, heads=2, **SMALL)
    mesh = parse_mesh("data=2,fsdp=2,tensor=2")
    sharded, opt = model.sharded(ShardActivations(mesh)), wrap(optax.sgd(0.1), model.precision)
    state = init_state(model.init(jax.random.key(0)), opt, model_state=model.init_state())
    shardings = state_shardings(state, model.axes, mesh)
    step = make_train_step(sharded.loss, opt, mesh=mesh, shardings=shardings)
    read = {k: x for k, x in batch().items() if k != "source"}
    state, metrics = step(jax.device_put(state, shardings), read)
    assert np.isfinite(float(metrics["loss"])) and int(state.step) == 1


def test_the_head_lies_before_the_loop_in_the_dtype_in_which_it_is_used() -> None:
    """Widened there, for the dtype of its gradients, it would take twice the memory."""
    mesh, model = parse_mesh("fsdp=8"), decoder(
        "tiny", get_precision("bf16"), heads=2, tied=False, **SMALL
    )  # fmt: skip
    read = {k: x for k, x in batch().items() if k != "source"}
    gradient = jax.jit(jax.grad(loss_of(model.sharded(ShardActivations(mesh)))))
    program = gradient.lower(model.init(jax.random.key(0)), read).compile().as_text() or ""
    loops = [line for line in program.splitlines() if " while(" in line]
    heads = [
        re.findall(r"\b(bf16|f32)\[(?:1,)?16,64\]", line.split(" while(")[0]) for line in loops
    ]
    # the backward loop sums gradients in float32
    assert [sorted(found) for found in heads if found] == [["bf16"], ["bf16", "f32"]]
