"""Runs the step that stopped a run again and says what broke in it.

`python -m mpjax.replay DIR`, the folder of a run that `train_lm.py` left, or its `replay/`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import jax

from mpjax.commands import run_command
from mpjax.errors import ConfigError
from mpjax.models import DecoderConfig, decoder
from mpjax.optim import make_optimizer
from mpjax.precision import get_precision
from mpjax.train import build, parse_mesh
from mpjax.train.checkpoint.bundle import explain, load_bundle, read_meta


def rebuilt(meta: dict[str, Any]) -> tuple[Any, Any, str]:
    """Returns a fresh state, the step and a line about the devices, from what a run wrote.

    Args:
      meta: `model` (fields of DecoderConfig), `precision`, `optimizer` (arguments of
        `make_optimizer`), `build` (arguments of `build`), `mesh` (its text) and `devices`.

    Raises:
      ConfigError: something that this version does not know.
    """
    try:
        model = decoder(DecoderConfig(**meta["model"]), get_precision(meta["precision"]))
        raw = make_optimizer(**meta["optimizer"])
        same = jax.device_count() == meta["devices"]  # else the mesh does not fit
        apart = model.precision.compression.kind != "none" or meta["build"].get("diloco")
        if apart and not same:
            raise ConfigError(
                f"replay: the run's replicas were {meta['devices']} devices, there are"
                f" {jax.device_count()}; on a CPU set XLA_FLAGS="
                f"--xla_force_host_platform_device_count={meta['devices']}"
            )
        state, step = build(model, raw, parse_mesh(meta["mesh"]) if same else None, **meta["build"])
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"replay: the bundle was written by another version of mpjax ({error}); use that one"
        ) from error
    note = "" if same else f"on one device; the run had {meta['devices']}"
    return state, step, note


def replay(folder: str) -> str:
    """Returns what broke, in a few lines.

    Args:
      folder: of a run that stopped, or of its bundle.

    Raises:
      ConfigError: there is no bundle, or it cannot be rebuilt.
    """
    fresh, step, note = rebuilt(read_meta(folder))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh
    )
    state, batch, number = load_bundle(folder, abstract)
    head = f"step {number}" + (f" ({note})" if note else "")
    return f"{head}\n{explain(step, state, batch)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mpjax.replay", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="folder of a run that stopped")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("mpjax").setLevel(logging.INFO)  # compiling may take minutes
    return run_command(parser, lambda options: print(replay(options.folder)), arguments)


if __name__ == "__main__":
    sys.exit(main())
