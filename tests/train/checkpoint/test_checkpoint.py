"""Checkpoints: exact bits, one unit, atomic, damage found, other meshes and Precisions."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mpjax.errors import ConfigError
from mpjax.train.checkpoint import digest, store
from mpjax.train.checkpoint.checkpointer import Checkpointer
from mpjax.train.checkpoint.reader import CheckpointReader
from mpjax.train.checkpoint.restore import compare_settings, restore_into

pytestmark = pytest.mark.usefixtures("fast_compile")

ROOT = Path(__file__).resolve().parents[3]
DTYPES = (
    "float32 bfloat16 float16 float8_e4m3fn float8_e5m2 float8_e4m3 float8_e3m4 float8_e8m0fnu "
    "float4_e2m1fn int4 uint4 int2 uint2 int8 uint8 int16 uint16 int32 uint32 bool"
).split()


@dataclass(frozen=True)
class Scale:
    value: jax.Array
    good: jax.Array
    interval: int


jax.tree_util.register_dataclass(Scale, ["value", "good"], ["interval"])


class State(NamedTuple):
    params: Any
    opt_state: Any
    scale: Any
    step: jax.Array


def make_state(seed: int = 0) -> State:
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "embed": {"table": jax.random.normal(keys[0], (16, 8))},
        "mlp.up": {"kernel": jax.random.normal(keys[1], (8, 8)).astype(jnp.bfloat16)},
    }
    scale = Scale(jnp.float32(2.0**15 + seed), jnp.int32(seed), 2000)
    return State(params, optax.adam(1e-3).init(params), scale, jnp.int32(seed))


def bits(tree: Any) -> list[tuple[str, tuple[int, ...], bytes]]:
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 0x10
    path.write_bytes(data)


def arrays_file(folder: Path, step: int) -> Path:
    return max((folder / str(step) / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)


@pytest.fixture
def three(tmp_path):
    """A folder with the whole steps 10, 20 and 30 of states 1, 2 and 3."""
    with Checkpointer(tmp_path / "ckpt") as checkpointer:
        for i in (1, 2, 3):
            checkpointer.save(10 * i, make_state(i), {"data": {"position": i}})
    return tmp_path / "ckpt"


def random_bits(dtype: str) -> jax.Array:
    """All bit patterns of a narrow dtype, random ones of a wide: NaN payloads, -0.0, subnormals."""
    size, rng = jnp.dtype(dtype).itemsize, np.random.default_rng(0)
    if dtype == "bool":
        return jnp.arange(256) % 3 == 0
    if dtype in ("int4", "uint4", "int2", "uint2"):
        info = jnp.iinfo(dtype)
        return jnp.asarray(rng.integers(info.min, int(info.max) + 1, 256), jnp.int32).astype(dtype)
    raw = np.arange(256, dtype=np.uint8)
    if dtype == "float4_e2m1fn":
        return jnp.asarray((raw & 15).view(jnp.dtype(dtype)))
    if size > 1:
        raw = rng.integers(0, 256, 256 * size, dtype=np.uint8)
    array = raw.view(jnp.dtype(dtype))
    if size == 4 and dtype == "float32":
        array.view(np.uint32)[:4] = [0x7FC12345, 0xFFA00001, 0x80000000, 0x00000001]
    return jnp.asarray(array)


def test_every_dtype_round_trips_with_its_bits(tmp_path):
    state = {dtype: random_bits(dtype) for dtype in DTYPES}
    state |= {f"{dtype} scalar": x[3] for dtype, x in state.items()}
    for dtype in DTYPES:  # the array store may drop chunks that equal its fill value
        if jnp.issubdtype(jnp.dtype(dtype), jnp.floating) and dtype != "float8_e8m0fnu":
            state[f"{dtype} minus zero"] = jnp.full((8,), -0.0, dtype)
    state["empty"] = jnp.zeros((0, 3), jnp.bfloat16)
    nan = np.asarray(state["float32"]).view(np.uint32)[0]
    assert nan == 0x7FC12345, "the payload must reach the state for this test to say anything"
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        restored, _, _ = checkpointer.restore(abstract(state))
    for name in state:
        assert bits(restored[name]) == bits(state[name]), name
    zero = jnp.zeros((8,), jnp.float32)
    assert bits(zero) != bits(restored["float32 minus zero"])


def test_structure_static_data_and_metadata_come_back_as_one_unit(tmp_path):
    state, meta = (
        make_state(3),
        {"config": {"model": {"width": 8}}, "tokenizer": "tök", "data": [1]},
    )
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, meta, metrics={"validation_loss": 1.5})
        meta["tokenizer"] = "changed after the save"
        restored, saved, step = checkpointer.restore(abstract(state))
        assert checkpointer.read_meta() == saved
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert restored.scale.interval == 2000
    assert bits(restored) == bits(state) != bits(make_state(4))
    assert (saved, step) == (
        {"config": {"model": {"width": 8}}, "tokenizer": "tök", "data": [1]},
        3,
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_a_donation_right_after_save_does_not_reach_the_checkpoint(tmp_path, sharded):
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    place = NamedSharding(mesh, P("fsdp")) if sharded else jax.devices()[0]
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 1.5 + 1, s), donate_argnums=0)
    state = jax.device_put(
        {str(i): jnp.arange(1 << 19, dtype=jnp.float32) for i in range(4)}, place
    )
    state = step(state)
    before = {name: np.array(x, copy=True) for name, x in state.items()}
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        for _ in range(30):
            state = step(state)
        jax.block_until_ready(state)
        checkpointer.wait()
        restored, _, _ = checkpointer.restore(target)
    for name, expected in before.items():
        np.testing.assert_array_equal(np.asarray(restored[name]), expected)
        assert not np.array_equal(np.asarray(state[name]), expected)


def test_restores_onto_another_mesh(tmp_path):
    devices = np.array(jax.devices())
    assert len(devices) == 8
    wide = Mesh(devices, ("fsdp",))
    square = Mesh(devices.reshape(2, 4), ("data", "tensor"))
    state = make_state()._replace(scale=None)
    state = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(wide, P("fsdp") if x.ndim else P())), state
    )
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(square, P("tensor", "data") if x.ndim else P())
        ),
        state,
    )
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        restored, _, _ = checkpointer.restore(target)
    assert bits(restored) == bits(state)
    table = restored.params["embed"]["table"]
    assert table.sharding == target.params["embed"]["table"].sharding
    assert table.addressable_shards[0].data.shape == (4, 4)
    assert state.params["embed"]["table"].addressable_shards[0].data.shape == (2, 8)


def test_every_damaged_file_is_named_or_harmless(three):
    target, names = abstract(make_state()), []
    good = bits(make_state(3))
    for path in sorted(p for p in (three / "30").rglob("*") if p.is_file()):
        name, content = path.relative_to(three / "30").as_posix(), path.read_bytes()
        for damage in ("missing", "truncated", "flipped"):
            if damage == "missing":
                path.unlink()
            elif damage == "truncated":
                path.write_bytes(content[: len(content) // 2])
            else:
                flip(path)
            with Checkpointer(three) as checkpointer:
                try:
                    state, _, step = checkpointer.restore(target)
                    assert bits(state) == good and step == 30
                except ConfigError as error:
                    names.append((damage, name))
                    assert "\n" not in str(error)
                    assert "step 30" in str(error) and "latest-good takes step 20" in str(error)
                    assert f"({name} " in str(error) or (damage, name) == ("flipped", digest.NAME)
            path.write_bytes(content)
    harmless = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    files = {
        p.relative_to(three / "30").as_posix() for p in (three / "30").rglob("*") if p.is_file()
    }
    assert {name for damage, name in names if damage == "truncated"} == files - harmless
    assert {name for damage, name in names if damage == "flipped"} == files - harmless
    assert {name for damage, name in names if damage == "missing"} == files - harmless


def test_latest_good_skips_damage_with_a_line_each(three, caplog):
    flip(arrays_file(three, 30))
    (three / "20" / "meta" / "meta.json").unlink()
    target = abstract(make_state())
    with Checkpointer(three) as checkpointer, caplog.at_level(logging.WARNING, "mpjax.train"):
        state, meta, step = checkpointer.restore(target, good_only=True)
        assert checkpointer.read_meta(step) == meta == {"data": {"position": 1}}
        with pytest.raises(ConfigError, match="step 30 is damaged .* takes step 10 before it"):
            checkpointer.restore(target)
    assert step == 10 and bits(state) == bits(make_state(1))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and "step 30" in lines[0] and "step 20" in lines[1]


def test_nothing_whole_is_an_error(three):
    for step in (10, 20, 30):
        flip(arrays_file(three, step))
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        CheckpointReader(three).restore(abstract(make_state()), good_only=True)


def test_after_an_older_step_is_restored_the_later_ones_give_way(three, caplog):
    flip(arrays_file(three, 30))
    with Checkpointer(three) as checkpointer:
        state, _, step = checkpointer.restore(abstract(make_state()), good_only=True)
        assert step == 20
        checkpointer.save(20, state, {})  # what was just restored is not written again
        assert checkpointer.steps() == [10, 20, 30]
        with caplog.at_level(logging.WARNING, "mpjax.train"):
            checkpointer.save(25, make_state(5), {})
        checkpointer.wait()
        assert checkpointer.steps() == [10, 20, 25]
        assert "dropped" in caplog.text and "[30]" in caplog.text
        assert bits(checkpointer.restore(abstract(make_state()))[0]) == bits(make_state(5))


def test_an_open_folder_can_go_back_and_on(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step), {})
        checkpointer.restore(abstract(make_state()), step=2)
        checkpointer.save(3, make_state(7), {})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2, 3]
        assert bits(checkpointer.restore(abstract(make_state()))[0]) == bits(make_state(7))


def test_another_run_is_not_overwritten(three):
    with Checkpointer(three) as checkpointer:
        for step in (5, 30):
            with pytest.raises(ConfigError, match="step 30 is already there; resume"):
                checkpointer.save(step, make_state(), {})
        checkpointer.save(40, make_state(), {})
        with pytest.raises(ConfigError, match="step 40 is already there"):
            checkpointer.save(35, make_state(), {})
    assert CheckpointReader(three).steps() == [20, 30, 40]


@pytest.mark.parametrize("reopened", [False, True])
def test_keeps_the_newest_and_the_best(tmp_path, reopened):
    losses = {1: 3.0, 2: 0.5, 3: float("nan"), 4: 0.7, 5: 2.0, 6: None, 7: 4.0}
    settings = dict(keep=2, keep_best=2)
    checkpointer = Checkpointer(tmp_path, **settings)
    for step, loss in losses.items():
        metrics = None if loss is None else {"validation_loss": loss}
        checkpointer.save(step, {"w": jnp.float32(step)}, {}, metrics=metrics)
        if reopened:
            checkpointer.close()
            checkpointer = Checkpointer(tmp_path, **settings)
    checkpointer.close()
    assert checkpointer.steps() == [2, 4, 6, 7]


def test_ranking_by_a_metric_that_is_not_given_is_an_error(tmp_path):
    with Checkpointer(tmp_path, keep_best=1, best_metric="bleu") as checkpointer:
        with pytest.raises(ConfigError, match=r"expected 'bleu'.*got \['loss'\]"):
            checkpointer.save(1, {"w": jnp.float32(0)}, {}, metrics={"loss": 1.0})


def test_a_failed_write_is_one_line_at_the_next_call_and_leaves_the_rest_whole(tmp_path):
    state = {"w": jax.random.normal(jax.random.key(0), (1 << 16,))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer = Checkpointer(tmp_path / "c", keep=1)
    checkpointer.save(1, state, {})
    checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the disk takes 50 kB a file
    try:
        with pytest.raises(ConfigError, match="no room for the checkpoint of step 2") as caught:
            checkpointer.save(2, state, {})
            checkpointer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and "0.3 MB" in str(caught.value)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]
    checkpointer.save(2, state, {})  # there is room again
    checkpointer.close()
    assert checkpointer.steps() == [2]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written here .*; give a folder"):
        Checkpointer(tmp_path / "file" / "checkpoints")
    with pytest.raises(ConfigError, match="expected a local path"):
        Checkpointer("gs://bucket/run")


def test_a_folder_that_vanishes_is_one_line(tmp_path):
    with Checkpointer(tmp_path / "c") as checkpointer:
        (tmp_path / "c").rmdir()
        (tmp_path / "c").write_text("")
        with pytest.raises(ConfigError, match="step 1 cannot be written") as caught:
            checkpointer.save(1, {"w": jnp.float32(0)}, {})
            checkpointer.wait()
    assert "\n" not in str(caught.value)


def test_bad_state_and_metadata_are_named(tmp_path):
    ok = {"w": jnp.float32(0)}
    with Checkpointer(tmp_path) as checkpointer:
        cases = [
            ({"a": {"b": 1.0}}, {}, "a/b: expected a jax.Array, got float"),
            ({"a": {"b": np.zeros(2)}}, {}, "a/b: expected a jax.Array, got ndarray"),
            ({"key": jax.random.key(0)}, {}, r"key: a typed key .* jax.random.key_data"),
            ({"a/b": ok["w"], "a": {"b": ok["w"]}}, {}, "a/b: two leaves"),
            ({}, {}, "holds no array"),
            (ok, {"config": object()}, "expected JSON values"),
        ]
        for state, meta, message in cases:
            with pytest.raises(ConfigError, match=message):
                checkpointer.save(1, state, meta)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s._replace(step=jnp.float32(0)), r"step is int32\[\] .*, float32\[\] here"),
        (lambda s: s._replace(params=s.params | {"new": s.step}), "params/new is not in the check"),
        (lambda s: s._replace(scale=None), "scale/value is only in the checkpoint"),
    ],
)
def test_another_structure_is_refused_by_path(three, change, message):
    with pytest.raises(ConfigError, match=message):
        CheckpointReader(three).restore(abstract(change(make_state())))


def test_unknown_steps_are_errors_and_a_reader_writes_nothing(three, tmp_path):
    with pytest.raises(ConfigError, match=r"expected one of the steps \[10, 20, 30\], got 7"):
        CheckpointReader(three).restore(abstract(make_state()), step=7)
    reader = CheckpointReader(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        reader.read_meta()
    assert not (tmp_path / "none").exists()
    left = three / f"40{store.TEMPORARY}"
    left.mkdir()
    CheckpointReader(three).restore(abstract(make_state()))
    assert left.exists()
    Checkpointer(three).close()
    assert not left.exists()


def test_a_save_that_is_killed_is_not_listed_and_is_cleaned(tmp_path):
    code = """
        import sys, jax, jax.numpy as jnp
        from mpjax.train.checkpoint.checkpointer import Checkpointer
        checkpointer = Checkpointer(sys.argv[1], keep=2)
        for step in range(1, 10_000):
            checkpointer.save(step, {"w": jnp.full((1 << 20,), step, jnp.float32)}, {"n": step})
            print(step, flush=True)
    """
    target = {"w": jax.ShapeDtypeStruct((1 << 20,), jnp.float32)}
    killed_inside = 0
    process = None
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(folder)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for _ in range(3):
            process.stdout.readline()
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        killed_inside += any(store.TEMPORARY in path.name for path in folder.iterdir())
        with Checkpointer(folder) as checkpointer:
            assert all(path.name.isdecimal() for path in folder.iterdir())
            state, meta, step = checkpointer.restore(target)
            assert step >= 1 and meta == {"n": step}
            assert (np.asarray(state["w"]) == step).all()
            assert all(checkpointer.newest_good() == step for _ in range(2))
    assert killed_inside >= 1


def test_nothing_but_errors_reaches_stderr(tmp_path):
    code = """
        import sys, resource, jax, jax.numpy as jnp
        from mpjax.errors import ConfigError
        from mpjax.train.checkpoint.checkpointer import Checkpointer
        state = {"w": jax.random.normal(jax.random.key(0), (1 << 16,))}
        with Checkpointer(sys.argv[1]) as checkpointer:
            checkpointer.save(1, state, {})
            checkpointer.restore(jax.eval_shape(lambda: state))
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))
            try:
                checkpointer.save(2, state, {})
                checkpointer.wait()
            except ConfigError:
                print("caught")
            try:
                checkpointer.save(3, state, {})
                checkpointer.close()
            except ConfigError:
                print("caught")
        import absl.logging
        absl.logging.error("not Orbax's")
    """
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(code), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == ["caught", "caught"], done.stderr
    assert done.stderr.strip() == "ERROR:absl:not Orbax's"


# Settings and other Precisions.


def test_settings_that_differ_are_named_with_both_values():
    saved = {"model": {"width": 64, "rotary": True}, "lr": 3e-4, "steps": 10, "rules": ["a", "b"]}
    compare_settings(saved, saved | {"steps": 20, "rules": ("a", "b")})
    current = {"model": {"width": 128, "rotary": 1}, "lr": 3e-4, "steps": 10, "seed": 0}
    with pytest.raises(ConfigError) as caught:
        compare_settings(saved, current)
    text = str(caught.value)
    for part in (
        "model.width was 64 at the save, is 128 now",
        "model.rotary was true at the save, is 1 now",
        'rules was ["a", "b"] at the save, is (not set) now',
        "seed was (not set) at the save, is 0 now",
        "--out",
    ):
        assert part in text
    assert "lr" not in text.replace("--", "") and "steps" not in text and "\n" not in text
    compare_settings(saved, current, may_change=("model", "rules", "seed"))
    with pytest.raises(ConfigError, match="steps was 10"):
        compare_settings({"steps": 10}, {"steps": 20}, may_change=())


def low(params: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def precision_state(kind: str, seed: int = 0, shape: tuple[int, int] = (4, 4)) -> dict[str, Any]:
    """float32, pure (bfloat16 only), or master (bfloat16 with a float32 copy)."""
    full = {"decoder": {"table": jax.random.normal(jax.random.key(seed), shape)}}
    moments = {"mu": jax.tree.map(lambda x: x * 0.1, full)}
    if kind == "float32":
        return {"params": full, "opt_state": {"moments": moments}}
    weights = {"master": full} if kind == "master" else {}
    return {
        "params": low(full, jnp.bfloat16),
        "opt_state": {"moments": moments, "weights": weights},
    }


TABLE, MASTER = "params/decoder/table", "opt_state/weights/master/decoder/table"


@pytest.mark.parametrize(
    "source, target, lines",
    [
        ("float32", "pure", [f"{TABLE}: float32 -> bfloat16"]),
        ("pure", "float32", [f"{TABLE}: bfloat16 -> float32"]),
        (
            "float32",
            "master",
            [f"{MASTER}: from {TABLE}, float32 -> float32", f"{TABLE}: float32 -> bfloat16"],
        ),
        ("pure", "master", [f"{MASTER}: from {TABLE}, bfloat16 -> float32"]),
        ("master", "float32", [f"{TABLE}: from {MASTER}, float32 -> float32"]),
        ("master", "pure", [f"{MASTER}: only in the checkpoint, dropped"]),
        ("master", "master", []),
    ],
)
def test_restores_into_another_precision(tmp_path, source, target, lines):
    saved, fresh = precision_state(source, seed=1), precision_state(target, seed=2)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, saved, {})
        restored, report = restore_into(fresh, checkpointer)
    assert report == lines
    assert jax.tree.structure(restored) == jax.tree.structure(fresh)
    truth = precision_state("float32", seed=1)["params"]
    if source == "pure":
        truth = low(low(truth, jnp.bfloat16), jnp.float32)
    dtype = jnp.float32 if target == "float32" else jnp.bfloat16
    assert bits(restored["params"]) == bits(low(truth, dtype)) != bits(fresh["params"])
    assert bits(restored["opt_state"]["moments"]) == bits(saved["opt_state"]["moments"])
    if target == "master":
        assert bits(restored["opt_state"]["weights"]["master"]) == bits(truth)


def test_what_only_one_side_has_is_reported(tmp_path):
    fresh = {"params": {"w": jnp.ones(3)}, "scale": jnp.float32(2.0**15)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"w": jnp.zeros(3)}, "ema": jnp.ones(2)}, {})
        restored, report = restore_into(fresh, checkpointer, 1)
        with pytest.raises(ConfigError, match="scale is not in the checkpoint and has no fresh"):
            restore_into(abstract(fresh), checkpointer, 1)
    assert report == [
        "scale: not in the checkpoint, left fresh",
        "ema: only in the checkpoint, dropped",
    ]
    assert restored["params"]["w"].tolist() == [0, 0, 0] and restored["scale"] == 2.0**15


@pytest.mark.parametrize(
    "fresh, message",
    [
        ({"params": {"w": jnp.zeros(4)}}, r"params/w has shape \(3,\) .* params/w has \(4,\) here"),
        (
            {"params": {"w": jnp.zeros(3, jnp.int8)}},
            "float32 in the checkpoint cannot be cast to i",
        ),
        ({"params": {"w": jnp.zeros(3, jnp.float16)}}, "params/w: 1 values overflow float16"),
        ({"other": jnp.zeros(3)}, "no leaf of the checkpoint has a path of this state"),
    ],
)
def test_what_cannot_be_cast_is_refused(tmp_path, fresh, message):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"w": jnp.array([1.0, jnp.inf, 1e6])}}, {})
        with pytest.raises(ConfigError, match=message):
            restore_into(fresh, checkpointer)


def test_a_precision_is_restored_onto_another_mesh(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    place = NamedSharding(mesh, P("fsdp"))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, precision_state("float32", 1, (8, 4)), {})
        restored, _ = restore_into(
            jax.device_put(precision_state("master", 2, (8, 4)), place), checkpointer
        )
    assert all(x.sharding == place for x in jax.tree.leaves(restored))
    assert bits(restored["opt_state"]["weights"]["master"]) == bits(
        precision_state("float32", 1, (8, 4))["params"]
    )


def test_the_digest_lists_the_files_it_covers(three):
    listed = set(json.loads((three / "30" / digest.NAME).read_text()))
    assert "meta/meta.json" in listed and any(name.startswith("state/d/") for name in listed)
