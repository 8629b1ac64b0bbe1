"""Forecasts against the step that really runs, and what the other process does with mistakes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import mpjax
from mpjax.errors import ConfigError
from mpjax.models import decoder
from mpjax.targets import Forecast, forecast, page, parse_target, preflight, read_chip
from mpjax.targets.devices import clean_environment
from mpjax.train import build, build_abstract

SMALL = dict(layers=2, width=64, heads=4, vocabulary=256, context=32)
ROWS, SEQ = 8, 32


def ids(dtype=jnp.int32, sharding=None):
    one = jax.ShapeDtypeStruct((ROWS, SEQ), dtype, sharding=sharding)
    return {"inputs": one, "targets": one}


@pytest.fixture(scope="module")
def found() -> list[Forecast]:
    """What another process found for two precisions on eight devices."""
    return preflight(
        "tiny", precision=["bf16", "int8"], target="cpu:8", mesh="data=2,fsdp=2,tensor=2", batch=2,
        seq=SEQ, **{k: v for k, v in SMALL.items() if k != "context"},
    )  # fmt: skip


REAL = """
import json, sys
import jax, jax.numpy as jnp
from mpjax.models import decoder
from mpjax.optim import make_optimizer
from mpjax.train import build

found = []
for precision in ("bf16", "int8"):
    model = decoder("tiny", precision, **json.loads(sys.argv[1]), remat="full", loop="scan")
    mesh = "data=2,fsdp=2,tensor=2"
    state, step = build(model, make_optimizer("adamw", 1e-4), mesh, clip=1.0)
    ids = jnp.zeros((8, 32), jnp.int32)
    batch = step.place({"inputs": ids, "targets": ids})
    real = step.compiled.lower(state, batch).compile().memory_analysis()
    state, metrics = step(state, batch)
    assert jnp.isfinite(metrics["loss"])
    found.append((real.argument_size_in_bytes, real.temp_size_in_bytes))
print(json.dumps(found))
"""


def test_the_forecast_is_of_the_step_that_runs(found: list[Forecast]) -> None:
    # In a process of its own: other flags of XLA give a CPU's program other temporaries.
    done = subprocess.run(
        [sys.executable, "-c", REAL, json.dumps(SMALL)], capture_output=True, text=True,
        env=clean_environment(parse_target("cpu:8")), check=True,
    )  # fmt: skip
    for one, (arguments, temporaries) in zip(found, json.loads(done.stdout), strict=True):
        assert one.arguments == arguments
        assert one.temporaries == pytest.approx(temporaries, rel=0.1)


def test_the_parts_are_what_the_compiler_counts(found: list[Forecast]) -> None:
    for one in found:
        state = sum(one.parts[n] for n in ("weights", "optimizer state", "other state", "batch"))
        assert state == one.arguments
        assert one.parts["gradients"] == one.parts["weights"]  # both float32 here


def test_products_are_counted_by_their_dtype(found: list[Forecast]) -> None:
    bf16, int8 = found
    # Forward, once more (but for the last product of a block, whose result nobody reads), and
    # twice backward: 4 times; the head has no block, and 3.
    tokens, d, v, f, layers = ROWS * SEQ, SMALL["width"], SMALL["vocabulary"], 192, 2
    blocks = 2 * tokens * layers * (4 * 4 * d * d + (4 + 4 + 3) * d * f)
    attention = 4 * layers * 2 * 2 * tokens * SEQ * d
    assert bf16.flops == {"bfloat16": (blocks + attention + 3 * 2 * tokens * d * v) / 8}
    assert int8.flops["int8"] == blocks / 8
    assert int8.flops["bfloat16"] == bf16.flops["bfloat16"] - blocks / 8


def test_what_is_sent_is_listed_by_axis(found: list[Forecast]) -> None:
    axes = {part for one in found[0].sent for part in one.axes.split(",")}
    assert {"data", "fsdp", "tensor"} <= axes
    for one in found[0].sent:
        assert 0 < one.moved <= 2 * one.bytes
    # Scales are of the whole array: a recipe has more collectives, if small ones.
    count = [sum(one.count for one in each.sent) for each in found]
    assert count[1] > count[0] and f"| {count[0]:,} | {count[1]:,} |" in page(found)


def test_a_forecast_survives_json_and_a_page_shows_it(found: list[Forecast]) -> None:
    assert [Forecast.of(json.loads(json.dumps(one.to_dict()))) for one in found] == found
    text = page(found)
    for part in (
        "| weights |",
        "| peak |",
        "## Sent between devices",
        "| int8 |",
        "largest arrays",
    ):
        assert part in text
    assert "None" not in text and "nan" not in text


def test_rates_bound_the_step_and_what_does_not_fit_is_told_what_to_do() -> None:
    model = decoder("tiny", "bf16", **SMALL)
    state, step = build_abstract(model, optax.adamw(1e-4))
    one = forecast(step, state, ids(), chip=read_chip("v5e"))
    assert one.seconds["compute"] == pytest.approx(
        sum(n / read_chip("v5e").rate(d) for d, n in one.flops.items())
    )
    assert one.fits and one.step_seconds == max(one.seconds.values())
    shared = dataclasses.replace(one, mesh={"fsdp": 2, "tensor": 4})
    assert shared.tokens_per_s == one.tokens_per_s / 4 == ROWS * SEQ / one.step_seconds / 4
    small = dataclasses.replace(one, memory=one.peak // 2, batch=8, mesh={"data": 4, "fsdp": 2})
    assert not small.fits
    text = str(small)
    for remedy in ("too much", "fsdp=8,data=1", "moments=int8@256", "batch 4", "remat=full"):
        assert remedy in text
    # Control: nothing of it where it fits.
    assert "too much" not in str(one)


def test_the_compilers_refusal_is_read() -> None:
    from mpjax.targets.forecasting import _refused

    model = decoder("tiny", "bf16", **SMALL)
    state, step = build_abstract(model, optax.adamw(1e-4))
    one = forecast(step, state, ids(), chip=read_chip("v5e"))
    one = dataclasses.replace(one, arguments=0, code=0)
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
    refused = _refused(one, said, 1.0)
    assert not refused.fits and refused.peak == int(20.5 * 2**30) and "at least" in str(refused)
    said = "the total memory required for HLO temporaries (17.50G) exceeds available HBM (15.75G)."
    refused = _refused(one, said, 1.0)
    assert not refused.fits and refused.temporaries == int(17.5 * 2**30)
    with pytest.raises(ConfigError, match="the compiler failed: INTERNAL"):
        _refused(one, "INTERNAL: something else", 1.0)


def test_an_abstract_step_is_the_program_of_the_built_one() -> None:
    model = decoder("tiny", "fp16", **SMALL)
    for mesh in (None, "data=2,fsdp=2,tensor=2"):
        state, step = build(model, optax.adamw(1e-4), mesh, clip=1.0)
        shapes, other = build_abstract(model, optax.adamw(1e-4), mesh, clip=1.0)
        batch = step.place({k: jnp.zeros((ROWS, SEQ), jnp.int32) for k in ("inputs", "targets")})
        one = step.compiled.lower(state, batch).as_text()
        assert one == other.compiled.lower(shapes, batch).as_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(target="v5e:2"), "2 axes"),
        (dict(precision="bf61"), "bf16"),
        (dict(precision=[]), "no precision"),
        (dict(batch=0), "batch"),
        (dict(seq=1.5), "seq"),
        (dict(optimizer="adam"), "adamw"),
        (dict(width=63), "63"),
        (dict(no_such=1), "no_such"),
        (dict(model="llama-7"), "llama-7"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_compiled(settings, said) -> None:
    settings = dict(model="tiny", target="cpu:2", seq=16) | settings
    with pytest.raises(ConfigError, match=said) as error:
        preflight(settings.pop("model"), **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(mesh="fsdp=3"), "there are 2"),
        (dict(accumulate=3), "accumulate|microbatches"),
        (dict(imports=["/nowhere/recipes.py"]), "is no file"),
    ],
)
def test_a_mistake_that_the_other_process_finds_is_one_line_too(settings, said) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        preflight("tiny", target="cpu:2", seq=16, layers=1, batch=2, **settings)
    assert "\n" not in str(error.value)


def test_recipes_of_ones_own_are_known_to_the_other_process(tmp_path) -> None:
    file = tmp_path / "mine_here.py"
    made = 'dataclasses.replace(mpjax.get_precision("bf16"), name="mine-here")'
    file.write_text(f"import dataclasses, mpjax\nmpjax.register_preset({made})\n")
    (one,) = mpjax.preflight(
        "tiny", precision="mine-here", target="cpu:1", seq=16, layers=1, width=32, heads=2,
        imports=[file],
    )  # fmt: skip
    assert one.precision == "mine-here" and one.arguments > 0


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("llama-7b", "model: 'llama-7b' is no model"),
        (decoder, "no model"),
        (mpjax.models.encoder("bert-tiny"), "Encoder has no loss of its own; give objective="),
    ],
)
@pytest.mark.parametrize("make", [build, build_abstract])
def test_what_is_no_model_is_one_line(make, model, said) -> None:
    with pytest.raises(ConfigError, match=said):
        make(model, optax.sgd(0.1))
    with pytest.raises(ConfigError, match="mesh: 8 is no mesh"):
        make(decoder("tiny", layers=1, width=16, heads=2), optax.sgd(0.1), 8)
