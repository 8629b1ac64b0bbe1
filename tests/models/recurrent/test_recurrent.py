"""LSTM and GRU models: against numpy step by step, as a loop, in halves, and by dtype."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.formats.delayed import observed_of, with_observed
from mpjax.interpret.core.walk import scan_sizes
from mpjax.models import Recurrent, generate, recurrent
from mpjax.precision import get_precision
from tests.models.shapes import BATCH, FAST, IDS, stirred
from tests.ops.jaxprs import equations

pytestmark = pytest.mark.usefixtures("fast_compile")
SIZE = dict(vocabulary=32, width=16, layers=2)
CELLS = ("lstm", "gru")


def small(precision: Any = "fp32", **changes: Any) -> Recurrent:
    return recurrent("tiny", precision, **(SIZE | changes))


def logits_of(model: Recurrent, params: Any, ids: Any, state: Any = None) -> Any:
    step = jax.jit(lambda p, i, s: model.apply(p, i, state=s), compiler_options=FAST)
    return step(params, ids, state)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def oracle(model: Recurrent, params: Any, ids: Any) -> np.ndarray:
    """Logits (T, V) of one sequence in float64, one token and one layer at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)["recurrent"]
    c, cells, out = model.config, p["layers"]["cell"], []
    h, memory = np.zeros((2, c.layers, c.width))
    for token in ids:
        x = p["embed"]["table"][token]
        for layer in range(c.layers):
            above = x @ cells["input"]["kernel"][layer] + cells["input"]["bias"][layer]
            across = h[layer] @ cells["hidden"]["kernel"][layer]
            if c.cell == "lstm":
                i, f, g, o = np.split(above + across, 4)
                memory[layer] = sigmoid(f + 1) * memory[layer] + sigmoid(i) * np.tanh(g)
                h[layer] = sigmoid(o) * np.tanh(memory[layer])
            else:
                r, z, n = zip(np.split(above, 3), np.split(across, 3), strict=True)
                new = np.tanh(n[0] + sigmoid(sum(r)) * n[1])
                h[layer] += (1 - sigmoid(sum(z))) * (new - h[layer])
            x = h[layer]
        out.append(p["embed"]["table"] @ x if c.tied else x @ p["head"]["kernel"])
    return np.stack(out)


@pytest.mark.parametrize(("cell", "tied"), [("lstm", True), ("gru", False)])
def test_logits_are_those_of_numpy_step_by_step(cell: str, tied: bool) -> None:
    model = small(cell=cell, tied=tied)
    params = stirred(model)
    got, state = logits_of(model, params, IDS)
    want = np.stack([oracle(model, params, ids) for ids in np.asarray(IDS)])
    assert state is None
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


def loop_loss(model: Recurrent, params: Any, batch: Any) -> Any:
    """The loss by a Python loop over tokens and layers, in jnp, with no scan and no custom rule."""
    p, c = params["recurrent"], model.config
    cells = p["layers"]["cell"]
    shape = (batch["inputs"].shape[0], c.width)
    state = [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(c.layers)]
    loss = jnp.float32(0)
    for t in range(batch["inputs"].shape[1]):
        x = p["embed"]["table"][batch["inputs"][:, t]]
        for n, (h, memory) in enumerate(state):
            above = x @ cells["input"]["kernel"][n] + cells["input"]["bias"][n][None]
            across = h @ cells["hidden"]["kernel"][n]
            if c.cell == "lstm":
                i, f, g, o = jnp.split(above + across, 4, axis=-1)
                keep = jax.nn.sigmoid(f + 1)
                memory = keep * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
                x = jax.nn.sigmoid(o) * jnp.tanh(memory)
            else:
                a, b = jnp.split(above, 3, axis=-1), jnp.split(across, 3, axis=-1)
                r, z = jax.nn.sigmoid(a[0] + b[0]), jax.nn.sigmoid(a[1] + b[1])
                x = (1 - z) * jnp.tanh(a[2] + r * b[2]) + z * h
            state[n] = (x, memory)
        logits = jax.nn.log_softmax(x @ p["embed"]["table"].T)
        loss -= jnp.take_along_axis(logits, batch["targets"][:, t : t + 1], axis=1).mean()
    return loss / batch["inputs"].shape[1]


SHORT = {name: ids[:, :3] for name, ids in BATCH.items()}


@pytest.mark.parametrize("cell", CELLS)
def test_loss_and_gradients_are_those_of_a_loop(cell: str) -> None:
    model = small(cell=cell, layers=1)
    params = stirred(model)
    ours = jax.value_and_grad(lambda p: model.loss(p, SHORT)[0])
    naive = jax.value_and_grad(lambda p: loop_loss(model, p, SHORT))
    one, other = (jax.jit(f, compiler_options=FAST)(params) for f in (ours, naive))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("cell", CELLS)
def test_two_halves_with_the_memory_between_them_are_the_whole(cell: str) -> None:
    model = small(cell=cell, layers=1 if cell == "gru" else 2)
    params, half = stirred(model), IDS[:, :4]
    rest = IDS[:, 4:8]
    whole, _ = logits_of(model, params, IDS[:, :8], model.init_cache(2))
    first, state = logits_of(model, params, half, model.init_cache(2))
    second, _ = logits_of(model, params, rest, state)
    forgetful, _ = logits_of(model, params, rest, model.init_cache(2))
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=2e-6)
    assert float(jnp.abs(forgetful - whole[:, 4:]).max()) > 1e-2


def test_generated_text_is_what_whole_passes_would_choose() -> None:
    model = small(layers=1)
    params = stirred(model)
    prompt = IDS[:, :3]
    new = generate(model, params, prompt, new=3, temperature=0.0)
    whole = jnp.concatenate([prompt, new], axis=1)
    logits, _ = logits_of(model, params, whole)
    np.testing.assert_array_equal(new, logits[:, 2:-1].argmax(-1))
    with pytest.raises(ConfigError, match="Recurrent keeps no keys and values"):
        generate(model, params, prompt, new=3, temperature=0.0, cache="int8")


def carries(model: Recurrent) -> list[set[str]]:
    """Dtypes (rank above 1) of what each forward scan over time hands from step to step."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    scans = [e for e in equations(model.apply, params, IDS) if e.primitive.name == "scan"]
    found = []
    for scan in scans:
        given, kept = scan_sizes(scan)
        avals = [v.aval for v in scan.invars[given : given + kept]]
        found.append({a.dtype.name for a in avals if a.ndim == 2})
    return found


@pytest.mark.parametrize(
    ("precision", "lstm", "gru"),
    [
        ("bf16", {"bfloat16", "float32"}, {"float32"}),
        ("fp16", {"float16", "float32"}, {"float32"}),
        ("p=f32,c=bf16,o=bf16", {"bfloat16", "float32"}, {"float32"}),
        ("fp8", {"bfloat16", "float32"}, {"float32"}),
        ("low-bf16", {"bfloat16"}, {"bfloat16"}),
        ("bf16 rule:**/cell/state=bf16", {"bfloat16"}, {"bfloat16"}),
    ],
)
def test_a_cells_memory_is_float32_unless_a_rule_says_otherwise(
    precision: str, lstm: set[str], gru: set[str]
) -> None:
    assert carries(small(precision, cell="lstm")) == [lstm] * 2
    assert carries(small(precision, cell="gru")) == [gru] * 2


def test_a_rule_on_one_layer_acts_there_only() -> None:
    assert carries(small("bf16 rule:recurrent/layers/1/cell=fp32")) == [
        {"bfloat16", "float32"},
        {"float32"},
    ]


def products(model: Recurrent) -> tuple[list[str], list[str]]:
    """Products outside of the loops over time and inside of them, forward."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    text = jax.jit(model.apply).lower(params, IDS).as_text()
    shapes = [
        re.sub(r"[() ]", "", line.split(" : ")[-1])
        for line in text.splitlines()
        if "stablehlo.dot_general" in line
    ]
    outside = [s for s in shapes if s.startswith("tensor<18x")]  # 9 tokens of 2 sequences
    return outside, [s for s in shapes if s.startswith("tensor<2x")]


def test_inputs_are_multiplied_at_once_and_low() -> None:
    outside, inside = products(small("bf16"))
    above, across = "tensor<18x16xbf16>,tensor<16x64xbf16>", "tensor<2x16xbf16>,tensor<16x64xbf16>"
    assert [s.split("->")[0] for s in outside] == [above, above, above.replace("16x64", "32x16")]
    assert {s.split("->")[0] for s in inside} == {across}
    _, inside = products(small("bf16 rule:**/cell/hidden=fp32"))
    assert {s.split("->")[0] for s in inside} == {across.replace("bf16", "f32")}


def test_a_low_weights_gradient_is_rounded_once_after_all_steps() -> None:
    low, high = small("pure-bf16 rule:**=p=bf16,c=f32,o=f32", layers=1), small(layers=1)
    params = stirred(low)

    def gradient(model: Recurrent, params: Any) -> Any:
        at = params["recurrent"]["layers"]["cell"]["hidden"]

        def loss(kernel: Any) -> Any:
            cell = params["recurrent"]["layers"]["cell"] | {"hidden": {"kernel": kernel}}
            whole = {"recurrent": params["recurrent"] | {"layers": {"cell": cell}}}
            return model.loss(whole, BATCH)[0]

        return jax.jit(jax.grad(loss), compiler_options=FAST)(at["kernel"])

    wide = gradient(high, jax.tree.map(lambda w: w.astype(jnp.float32), params))
    got, want = gradient(low, params), wide.astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    assert float((got == want).mean()) > 0.98  # a sum kept in bfloat16 would agree by chance


def test_delayed_scaling_threads_its_amax_through_time() -> None:
    model = small("fp8-delayed", layers=1)
    params, state = stirred(model), model.init_state()

    def loss(seen: Any) -> Any:
        return model.loss(params, BATCH, state=with_observed(state, seen))

    backward, after = jax.jit(jax.grad(loss, has_aux=True), compiler_options=FAST)(
        observed_of(state)
    )
    amax = after["amax"]["layers"]["cell"]["hidden"]["kernel"].observed_amax[0]
    kernel = params["recurrent"]["layers"]["cell"]["hidden"]["kernel"]
    assert 0 < float(amax[0]) < 1 and float(amax[1]) == float(jnp.abs(kernel).max())
    assert all(float(a[0, 2]) > 0 for a in backward)


def test_dropout_needs_a_key_and_draws_by_it() -> None:
    model = small(dropout=0.5, layers=1)
    params = stirred(model)
    loss = jax.jit(lambda n: model.loss(params, BATCH, key=jax.random.key(n), train=True)[0])
    assert float(loss(0)) == float(loss(0)) != float(loss(1))
    with pytest.raises(ConfigError, match="dropout needs a key"):
        model.loss(params, BATCH, train=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recurrent("smal"), "model: unknown size 'smal'; did you mean small"),
        (lambda: small(cell="ltsm"), "cell='ltsm' is unknown; known: lstm gru"),
        (lambda: small(hidden=3), "unknown field 'hidden'"),
        (lambda: small(width=0), "width=0 must be at least 1"),
        (lambda: small(dropout=1.0), r"dropout=1.0 must be in \[0, 1\)"),
        (lambda: small("bf16 rule:**/cel/state=fp32"), r"matches no path .*state"),
        (lambda: small("bf16 rule:**/state=fp8"), "recipe 'fp8' quantises matrix products"),
        (lambda: small("bf16 rule:**/head=fp8-delayed"), "recurrent/head: recipe 'fp8-delayed'"),
        (
            lambda: small(
                get_precision("bf16", rules=["recurrent/layers/1=bfloat16"], update="master")
            ),
            "recurrent/layers/1/cell/.*: stored in bf16, layer 0 in f32",
        ),
    ],
)
def test_mistakes_are_one_line(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
