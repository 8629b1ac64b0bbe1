"""The process that `preflight` starts: it compiles for a target and writes what it found.

`python -m mpjax.targets.child SPEC.json ANSWER.json`, in `clean_environment(target)`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mpjax.commands import import_file
from mpjax.errors import ConfigError
from mpjax.files import write_text
from mpjax.models import decoder
from mpjax.ops import tracing_for
from mpjax.optim import make_optimizer
from mpjax.precision import Precision, get_precision
from mpjax.targets.chips import Chip
from mpjax.targets.devices import Target, parse_target, target_devices_of
from mpjax.targets.figures import Forecast, mega
from mpjax.targets.forecasting import forecast
from mpjax.train import ShardActivations, build_abstract, parse_mesh
from mpjax.train.room import free_bytes

_MOST_ROWS = 4096  # on a device


def _on_a_device(target: Target, devices: int) -> Chip | None:
    """What a device has: a chip, or a part of one that shows as several; None for CPU devices."""
    chip = target.chip
    if chip is None or devices == target.count:
        return chip
    part = target.count / devices
    return dataclasses.replace(
        chip, memory=chip.memory * part, bandwidth=chip.bandwidth * part, link=chip.link * part,
        between=chip.between * part,
        flops={dtype: rate * part for dtype, rate in chip.flops.items()},
    )  # fmt: skip


class _Course:
    """Compiles one step after another for the same devices."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._spec, self._target = spec, parse_target(spec["target"])
        devices = target_devices_of(self._target)
        self._mesh = parse_mesh(spec["mesh"] or f"fsdp={len(devices)}", devices)
        self._chip = _on_a_device(self._target, len(devices))
        # Devices of this host share its memory.
        self._shared = 0 if self._chip else free_bytes(devices[0]) // len(devices)

    def compile(self, precision: Precision, rows: int) -> Forecast:
        """The forecast of so many rows on a device."""
        spec, mesh = self._spec, self._mesh
        model = decoder(spec["model"], precision, **spec["settings"])
        model = model.sharded(ShardActivations(mesh))
        state, step = build_abstract(
            model, make_optimizer(spec["optimizer"], 1e-4), mesh, clip=spec["clip"],
            accumulate=spec["accumulate"],
        )  # fmt: skip
        count = rows * mesh.shape["data"] * mesh.shape["fsdp"]
        step.check_batch(count)
        cut = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        ids = jax.ShapeDtypeStruct((count, spec["seq"]), jnp.int32, sharding=cut)
        with tracing_for(self._target.platform, devices=mesh.size):
            kernels = model.attention_kernels(spec["seq"])
        found = forecast(
            step, state, {"inputs": ids, "targets": ids}, chip=self._chip, target=spec["target"],
            kernels=kernels,
        )  # fmt: skip
        return dataclasses.replace(found, memory=found.memory or self._shared)

    def most(self, precision: Precision, first: Forecast) -> int:
        """The largest number of rows on a device that fits, to a sixteenth."""
        known = {first.batch: first}

        def fits(rows: int) -> bool:
            if rows not in known:
                known[rows] = self.compile(precision, rows)
                one = known[rows]
                verdict = "fits" if one.fits else "does not fit"
                print(f"{precision.name}: batch {rows}: {mega(one.peak)}, {verdict}", flush=True)
            return known[rows].fits

        unit, memory = self._spec["accumulate"], first.memory
        low, high = (first.batch, None) if first.fits else (0, first.batch)
        while high is None and low < _MOST_ROWS:
            low, high = (2 * low, None) if fits(2 * low) else (low, 2 * low)
        # What a step needs grows nearly in proportion to its rows.
        while high is not None and high - low > max(unit, low // 16):
            base = known[low].peak if low in known else 0
            slope = max(known[high].peak - base, 1) / (high - low)
            guess = low + int((memory - base) / slope) // unit * unit
            guess = min(max(guess, low + unit), high - unit)
            low, high = (guess, high) if fits(guess) else (low, guess)
        return low


def run(spec: dict[str, Any]) -> list[Forecast]:
    """The forecasts that a spec asks for."""
    for file in spec["imports"]:
        import_file(Path(file))
    course, found = _Course(spec), []
    for name in spec["precision"]:
        precision = get_precision(
            name, rules=spec["rules"], moments=spec["moments"], update=spec["update"]
        )
        print(f"{name}: compiling for {spec['target']}", flush=True)
        one = dataclasses.replace(course.compile(precision, spec["batch"]), precision=name)
        if spec["search"]:
            one = dataclasses.replace(one, most=course.most(precision, one))
        found.append(one)
    return found


def main(arguments: list[str]) -> int:
    """Reads a spec, writes an answer: the forecasts, or an error of one line."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    asked, answer = map(Path, arguments)
    try:
        done = run(json.loads(asked.read_text()))
        found: dict[str, Any] = {"forecasts": [one.to_dict() for one in done]}
    except ConfigError as error:
        found = {"error": str(error)}
    write_text(answer, json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
