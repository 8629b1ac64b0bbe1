"""Weights quantised after training: against numpy, in the model, and what they cost."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.errors import ConfigError
from mpjax.formats import is_quantized
from mpjax.models import quantize_weights, weight_report
from mpjax.models.core.storage import Storage, stored_bytes
from tests.models.shapes import FAST, IDS, logits, small, stirred

pytestmark = pytest.mark.usefixtures("fast_compile")


def by_path(params: Any) -> dict[str, Any]:
    named = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in named}


def in_numpy(w_DF: np.ndarray, largest: int, block: int) -> np.ndarray:
    """Symmetric round to nearest with a scale for each output and block of inputs, float64."""
    out = np.empty(w_DF.shape)
    for start in range(0, len(w_DF), block):
        part = w_DF[start : start + block].astype(np.float64)
        scale = np.abs(part).max(0, keepdims=True) / largest
        out[start : start + block] = np.rint(part / scale).clip(-largest - 1, largest) * scale
    return out


@pytest.mark.parametrize(
    ("storage", "largest", "block"), [("int8", 127, 16), ("int4", 7, 16), ("int4@8", 7, 8)]
)
def test_kernels_are_those_of_numpy(storage: str, largest: int, block: int) -> None:
    params = stirred(small())
    kernel = by_path(quantize_weights(params, storage))["decoder/layers/attention/query/kernel"]
    assert kernel.format.name == storage.split("@")[0] and kernel.is_stack
    for layer, (w, got) in enumerate(
        zip(by_path(params)["decoder/layers/attention/query/kernel"], kernel.dequantize(),
            strict=True)
    ):  # fmt: skip
        expected = in_numpy(np.asarray(w), largest, block)
        step = np.abs(np.asarray(w)).max() / largest
        # a quotient just beside a tie may round to the other side in float32
        assert (np.abs(got - expected) > 1e-6).mean() < 0.01, layer
        assert np.abs(got - expected).max() < 1.01 * step
        assert np.abs(w - got).max() > step / 4, "or nothing was lost, and nothing is shown"


@pytest.mark.parametrize("loop", ["scan", "unroll"])
@pytest.mark.parametrize("kind", ["llama", "gpt"])
def test_a_model_reads_them_as_it_reads_their_view(kind: str, loop: str) -> None:
    model = small("fp32", kind, loop=loop)
    params = stirred(model)
    stored = quantize_weights(params, "int4@8", rules=["**/embed=int8", "**/down=int4@8+offset"])
    view = jax.tree.map(
        lambda p: p.dequantize() if is_quantized(p) else p, stored, is_leaf=is_quantized
    )
    got, expected = logits(model, stored, IDS), logits(model, view, IDS)
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(got - logits(model, params, IDS)).max() > 1e-2


def test_fewer_bits_lose_more_and_scales_for_blocks_less() -> None:
    model = small()
    params = stirred(model)
    whole = logits(model, params, IDS)

    def lost(storage: str) -> float:
        got = logits(model, quantize_weights(params, storage), IDS)
        return float(np.square(got - whole).mean() / np.square(whole).mean())

    loss = {
        s: lost(s)
        for s in ("bf16", "int8", "int4@8+offset", "int4@8", "int4", "int4@tensor", "int2")
    }
    assert list(loss.values()) == sorted(loss.values()), loss
    assert loss["int8"] < 1e-3 < 0.1 < loss["int2"], "two bits are too few: the negative control"


def test_int8_rows_under_the_int8_recipe_multiply_integers() -> None:
    model = small("int8", loop="unroll")
    params = stirred(model)
    stored = quantize_weights(params, "int8")
    text = jax.jit(model.apply).lower(stored, IDS).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    whole = [line for line in products if "xi8>" in line and "-> tensor<" in line]
    # query, key, value, out, gate, up, down of two layers; attention and head stay in floats
    assert len(whole) == 14 and all("xi32>" in line for line in whole)
    plain = jax.jit(small("bf16", loop="unroll").apply).lower(stored, IDS).as_text()
    assert not [x for x in plain.splitlines() if "stablehlo.dot_general" in x and "xi8>" in x]

    # The stored rows are quantised again, to themselves: the product is numpy's in integers.
    from mpjax import ops
    from mpjax.precision import get_recipe, parse_policy

    q = jax.tree.map(lambda a: a[0], stored["decoder"]["layers"]["mlp"]["up"]["kernel"])
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    y = ops.linear(jnp.asarray(x), q.dequantize(), parse_policy("f32"), recipe=get_recipe("int8"))
    scale = np.abs(x).max(1, keepdims=True) / 127
    integers = np.rint(x / scale).astype(np.int64) @ np.asarray(q.values).astype(np.int64)
    assert np.allclose(y, integers * scale * np.asarray(q.scales), rtol=1e-5, atol=1e-6)


def test_what_is_kept_and_what_rules_change() -> None:
    params = stirred(small("fp32", "gpt"))
    kept = {p for p, leaf in by_path(quantize_weights(params)).items() if not is_quantized(leaf)}
    assert kept == {p for p in by_path(params) if not p.endswith("/kernel")}
    rules = ["**/down=keep", "**/embed=int8", "**/mlp=int4@8", "**/norm*=bf16"]
    changed = by_path(quantize_weights(params, "int8", rules=rules))
    layers = "decoder/layers/"
    assert changed[f"{layers}mlp/down/kernel"].dtype == jnp.float32
    assert changed["decoder/embed/table"].tile == (1, 16), "a row is a token"
    assert changed[f"{layers}mlp/up/kernel"].format.name == "int4"
    assert changed[f"{layers}norm_mlp/scale"].dtype == jnp.bfloat16
    assert changed[f"{layers}attention/out/kernel"].format.name == "int8"
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(
        quantize_weights(params, "bf16")))  # fmt: skip


def test_bytes_are_those_that_a_program_takes() -> None:
    params = stirred(small("fp32", width=64, vocabulary=32))
    for storage in ("int8", "int4@32", "e4m3", "bf16"):
        stored = quantize_weights(params, storage)
        compiled = jax.jit(lambda p: jax.tree.map(lambda a: a, p), compiler_options=FAST)
        taken = compiled.lower(stored).compile().memory_analysis()
        assert taken.argument_size_in_bytes == stored_bytes(stored)
    kernels = sum(leaf.size for path, leaf in by_path(params).items() if "kernel" in path)
    four = quantize_weights(params, "int4@32")
    assert stored_bytes(params) - stored_bytes(four) == kernels * (4 - 0.5 - 4 / 32) - (
        params["decoder"]["head"]["kernel"].size * (4 - 0.5 - 4 / 32)
    )


def test_the_report_names_each_weight_and_its_loss() -> None:
    params = stirred(small())
    rows = {row.path: row for row in weight_report(params, quantize_weights(params, "int8"))}
    assert set(rows) == set(by_path(params))
    up, norm = rows["decoder/layers/mlp/up/kernel"], rows["decoder/norm/scale"]
    assert up.storage == "int8@16x1" and 35 < up.sqnr < 55
    assert norm.storage == "float32" and norm.sqnr == np.inf and norm.bytes == 64
    assert sum(row.bytes for row in rows.values()) == stored_bytes(quantize_weights(params))


@pytest.mark.parametrize(
    ("storage", "rules", "message"),
    [
        ("int9", [], "weights: 'int9': format: unknown name 'int9'; did you mean"),
        ("int4@", [], "'int4@' is incomplete"),
        ("bf16@32", [], "scales a dtype; write bf16"),
        ("int8@none", [], "without a scale"),
        ("q4.4", [], "'q4.4'.*takes no scale"),
        ("bf16+offset", [], "'bf16.offset' scales a dtype; write bf16"),
        ("e4m3@32+offset", [], "'e4m3@32.offset': e4m3 with .* takes no offset; take int8, int4"),
        ("int4+ofset", [], "unknown name 'int4.ofset'.*.offset behind a number"),
        ("int8", ["**/mlpp=int4"], r"matches no weight; near misses: \*\*/mlp"),
        (
            "int8",
            ["**/mlp=int4", "**/up=int8"],
            "a rule before it takes it; write a dtype, move it up",
        ),
        ("int8", ["**/mlp"], "malformed; write PATTERN=STORAGE"),
        (
            "int8",
            ["**/norm*=int8"],
            "decides no matrix: .* such as decoder/layers/norm_attention/scale",
        ),
        ("int8", ["decoder/layers/0/mlp=int4"], "matches no weight"),
    ],
)
def test_a_wrong_setting_is_one_line(storage: str, rules: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        quantize_weights(stirred(small()), storage, rules=rules)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("lost", ["before", "after"])
def test_a_report_leaves_no_weight_out(lost: str) -> None:
    both = {"before": {"a": jnp.ones((4, 4)), "b": jnp.ones(4)}}
    both["after"] = dict(both["before"])
    assert [row.path for row in weight_report(**both)] == ["a", "b"]
    del both[lost]["b"]
    with pytest.raises(ValueError, match="b"):
        weight_report(**both)


def test_weights_are_not_quantised_twice() -> None:
    with pytest.raises(ConfigError, match="is stored in int8 already"):
        quantize_weights(quantize_weights(stirred(small())))


@pytest.mark.parametrize(
    "text", ["int8@row", "int4@32", "int4@32+offset", "e4m3@tensor", "e2m1@mx(32)", "f32"]
)
def test_storage_is_read_from_what_it_prints(text: str) -> None:
    assert str(Storage.parse(text)) == text
