"""How every experiment starts: XLA flags, compile cache, command line, one-line errors.

Import it before JAX: flags are read when JAX starts. Only entry scripts set flags.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.logging import RichHandler

# On CPU this scheduler costs a Transformer step about an eighth of its speed (measured).
FLAGS = ("--xla_cpu_enable_concurrency_optimized_scheduler=false",)


def set_flags() -> None:
    """Adds our flags to XLA_FLAGS unless the user has set them, and a compile cache."""
    given = os.environ.get("XLA_FLAGS", "")
    ours = [flag for flag in FLAGS if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([*filter(None, [given]), *ours])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    home = os.environ.get("MPJAX_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mpjax"
    )
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(home, "xla"))


set_flags()

import jax  # noqa: E402

from mpjax.data import Corpus  # noqa: E402
from mpjax.errors import ConfigError, TrainingStopped  # noqa: E402
from mpjax.models import Model, decoder  # noqa: E402
from mpjax.precision import Precision  # noqa: E402


def machine() -> str:
    """Returns devices and flags in one line."""
    device = jax.devices()[0]
    flags = os.environ["XLA_FLAGS"]
    return f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} cores, XLA_FLAGS={flags}"


def wide() -> Console:
    """Returns a console for tables; a pipe is taken to be wide enough for them."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


def positive(config: Any, *names: str) -> None:
    """Checks that settings are above zero.

    Raises:
      ConfigError: one is not.
    """
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name}: {getattr(config, name)} must be above 0")


def not_negative(config: Any, *names: str) -> None:
    """Checks that settings are zero or above.

    Raises:
      ConfigError: one is not.
    """
    for name in names:
        if not getattr(config, name) >= 0:
            raise ConfigError(f"{name}: {getattr(config, name)} must be 0 or above")


def writable(out: Path) -> None:
    """Makes the folder of a run, or says why it cannot be written.

    Raises:
      ConfigError: it is a file, or cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"out: {out} cannot be written ({error.strerror}); choose another --out"
        ) from None


def make_decoder(work: Any, corpus: Corpus, precision: Precision) -> Model:
    """Returns the decoder of a workload with the vocabulary of its tokenizer."""
    return decoder(
        work.model, precision, vocabulary=corpus.tokenizer.vocab_size, layers=work.layers,
        width=work.width, heads=work.heads, context=work.seq,
    )  # fmt: skip


def command(main: Callable[[Any], None], config: type[Any]) -> None:
    """Runs an experiment from the command line; what the user can mend is one line, status 2."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
    logging.getLogger("mpjax").setLevel(logging.INFO)
    arguments = tyro.cli(config, config=(tyro.conf.FlagConversionOff,))
    assert dataclasses.is_dataclass(arguments)
    try:
        main(arguments)
    except (ConfigError, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that vanished
        where = error.filename or ""
        print(f"error: {where}: {error.strerror or error}; free or choose a place", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
