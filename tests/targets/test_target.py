"""Targets: what can be read, what is refused in one line, and the chips' data."""

from __future__ import annotations

import importlib.util

import pytest

from mpjax.errors import ConfigError
from mpjax.targets import chips, parse_target, read_chip
from mpjax.targets.devices import clean_environment, require_compiler, target_devices_of


@pytest.mark.parametrize(
    ("text", "count", "platform"),
    [
        ("v5e:16x16", 256, "tpu"),
        ("2 x v5e:16x16", 512, "tpu"),
        ("2xv6e:4x4", 32, "tpu"),
        ("v5p:4x4x4", 64, "tpu"),
        ("h100:8", 8, "gpu"),
        (" cpu:8 ", 8, "cpu"),
        ("H100:8", 8, "gpu"),
    ],
)
def test_a_target_is_read(text: str, count: int, platform: str) -> None:
    target = parse_target(text)
    assert (target.count, target.platform) == (count, platform)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5e", "cannot be read; write v5e:16x16"),
        ("", "cannot be read"),
        (8, "cannot be read"),
        ("a10:8", "unknown chip 'a10'; did you mean a100"),
        ("m2:4", "unknown chip 'm2'; known: cpu v4 v5e"),
        ("v5e:16", "a topology of v5e has 2 axes, each of 1 or more; write v5e:4x4"),
        ("v5p:16x16", "has 3 axes"),
        ("h100:2x4", "has 1 number"),
        ("v5e:0x4", "each of 1 or more"),
        ("2 x h100:8", "only TPUs have slices; write h100:16"),
    ],
)
def test_a_target_that_cannot_be_is_one_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        parse_target(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "package"), [("v5e:2x4", "libtpu"), ("h100:8", r"mpjax\[cuda12\]")]
)
def test_a_missing_compiler_is_named(
    text: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=package):
        require_compiler(parse_target(text))
    require_compiler(parse_target("cpu:2"))


def test_more_cpu_devices_than_there_are_is_one_line() -> None:
    assert len(target_devices_of(parse_target("cpu:2"))) == 2
    with pytest.raises(ConfigError, match="device_count=64"):
        target_devices_of(parse_target("cpu:64"))


def test_the_environment_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_something=1")
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--a")
    monkeypatch.setenv("MINE", "kept")
    env = clean_environment(parse_target("v5e:2x4"))
    assert env["JAX_PLATFORMS"] == "cpu" and env["MINE"] == "kept"
    assert not {"XLA_FLAGS", "JAX_ENABLE_X64", "LIBTPU_INIT_ARGS"} & set(env)
    assert "device_count=4" in clean_environment(parse_target("cpu:4"))["XLA_FLAGS"]


def test_every_chip_says_where_its_rates_are_from() -> None:
    for name, chip in chips().items():
        assert chip.source.startswith("https://") and chip.platform in ("tpu", "gpu"), name
        assert min(chip.memory, chip.bandwidth, chip.link, *chip.flops.values()) > 1e9, name
        assert chip.rate("bfloat16") >= chip.rate("float32") > 0
        assert ("gpu_device_info" in chip.description) == (chip.platform == "gpu")


def test_a_format_that_a_chip_does_not_multiply_runs_in_bfloat16() -> None:
    v5e, h100, b200 = map(read_chip, ("v5e", "h100", "b200"))
    assert v5e.rate("float8_e4m3fn") == v5e.rate("bfloat16") == v5e.rate("float16")
    assert v5e.rate("float32") == v5e.rate("bfloat16") / 6
    assert h100.rate("float8_e5m2") == 2 * h100.rate("bfloat16") + 1e12
    assert h100.rate("float4_e2m1fn") == h100.rate("float8_e4m3fn") < b200.rate("float4_e2m1fn")
