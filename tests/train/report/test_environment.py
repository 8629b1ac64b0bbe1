"""The environment belongs to the numbers: each setting that changes them is known and compared."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import pytest

from mpjax.errors import ConfigError
from mpjax.precision import get_precision
from mpjax.train.report.environment import _JAX, environment, require_same_environment
from mpjax.train.report.manifest import manifest

CHANGED = [
    ("jax_enable_x64", True),
    ("jax_numpy_dtype_promotion", "standard"),
    ("jax_default_prng_impl", "rbg"),
    ("jax_threefry_partitionable", False),
    ("jax_random_seed_offset", 1),
    ("jax_default_matmul_precision", "float32"),
    ("jax_allow_f16_reductions", False),
    ("jax_disable_most_optimizations", True),
    ("jax_optimization_level", "O1"),
]


@pytest.mark.parametrize(("name", "value"), CHANGED)
def test_a_setting_of_jax_that_changed_is_named_with_both_values(name, value):
    saved, before = json.loads(json.dumps(environment())), jax.config.values[name]
    require_same_environment(saved)
    jax.config.update(name, value)
    try:
        assert manifest(get_precision("fp32"), {}, [], {})["environment"][name] == value
        with pytest.raises(ConfigError) as found:
            require_same_environment(saved)
    finally:
        jax.config.update(name, before)
    require_same_environment(saved)
    text = str(found.value)
    parts = (f"{json.dumps(saved[name])} at the save", f"is {json.dumps(value)} now", "--init-from")
    assert text.startswith(f"resume: {name} was ") and all(part in text for part in parts), text
    assert text.count(" at the save") == 1 and "\n" not in text


def test_the_settings_do_change_numbers():
    """Or a comparison of them would be for nothing."""
    key = jax.random.key(0)
    drawn = jax.random.normal(key, (2, 8))
    with jax.threefry_partitionable(not jax.config.jax_threefry_partitionable):
        assert not jnp.array_equal(jax.random.normal(key, (2, 8)), drawn)
    with jax.enable_x64(True):
        assert jnp.zeros(1).dtype == jnp.float64


def test_all_are_settings_that_jax_has():
    if jax.__version_info__ != (0, 10, 2):
        pytest.skip("another version has other settings, which are passed over")
    assert set(_JAX) <= set(jax.config.values)


FLAG = "--xla_cpu_enable_fast_math"


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ("", f"{FLAG}=true", (FLAG, "was (not set)", 'is "true" now')),
        (f"{FLAG}=true", "", (FLAG, 'was "true"', "is (not set) now")),
        (f"{FLAG}=true", f"{FLAG}=false", (FLAG, 'was "true"', 'is "false" now')),
        (f"{FLAG}=true", f"{FLAG}=true {FLAG}=false", (FLAG, 'is "false" now')),  # the last holds
        (f"{FLAG} --xla_a=1", f"--xla_a=2 {FLAG}=true", ("--xla_a", 'was "1"', 'is "2" now')),
    ],
)
def test_a_flag_of_xla_that_changed_is_named(monkeypatch, before, now, named):
    monkeypatch.setenv("XLA_FLAGS", before)
    saved = environment()
    require_same_environment(saved)
    monkeypatch.setenv("XLA_FLAGS", now)
    with pytest.raises(ConfigError) as found:
        require_same_environment(saved)
    assert all(part in str(found.value) for part in named), found.value
    assert str(found.value).count(" at the save") == 1


def test_flags_that_change_no_numbers_and_their_order_are_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_a=2")
    saved = environment()
    devices = "--xla_force_host_platform_device_count=3"
    monkeypatch.setenv("XLA_FLAGS", f"{devices} --xla_a=2 --xla_dump_to=/x --xla_b=1")
    require_same_environment(saved)
    (tmp_path / "flags").write_text("--xla_a=2\n--xla_b=1\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    require_same_environment(saved)


@pytest.mark.parametrize("name", ["NVIDIA_TF32_OVERRIDE", "LIBTPU_INIT_ARGS"])
def test_variables_of_an_accelerators_library_are_compared(monkeypatch, name):
    saved = environment()
    monkeypatch.setenv(name, "0")
    with pytest.raises(ConfigError, match=rf"{name} was \(not set\) at the save, is \"0\" now"):
        require_same_environment(saved)


def test_what_only_another_version_of_jax_has_is_no_difference():
    saved = environment()
    del saved["jax_softmax_custom_jvp"]
    require_same_environment(saved | {"jax_of_another_version": 1})
    assert os.environ["JAX_PLATFORMS"] and "JAX_PLATFORMS" not in saved
