"""How every experiment starts: XLA flags, compile cache, command line, one-line errors.

Import it before JAX: flags are read when JAX starts. Only entry scripts set flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

import tyro
from rich.console import Console
from rich.logging import RichHandler

T = TypeVar("T")
# On CPU this scheduler costs a Transformer step about an eighth of its speed (measured).
FLAGS = ("--xla_cpu_enable_concurrency_optimized_scheduler=false",)
COMPILED = "JAX_COMPILATION_CACHE_DIR"


def open_descriptors() -> None:
    """Opens those of the descriptors 0, 1 and 2 that are closed, onto nothing.

    Otherwise the next file that is opened gets the number, and what libraries print goes into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def our_compiled() -> str:
    """Returns where compiled programs are kept unless the user says otherwise."""
    home = os.environ.get("MPJAX_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mpjax"
    )
    return os.path.join(home, "xla")


def set_flags() -> None:
    """Adds our flags to XLA_FLAGS unless the user has set them, and a compile cache."""
    given = os.environ.get("XLA_FLAGS", "")
    ours = [flag for flag in FLAGS if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([*filter(None, [given]), *ours])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    os.environ.setdefault(COMPILED, our_compiled())


def set_log() -> None:
    """Shows warnings on stderr; early, because some imports would set the log up otherwise."""
    console = Console(stderr=True)
    handler: logging.Handler = logging.StreamHandler()  # does not wrap lines, for pipes
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


open_descriptors()
set_flags()
set_log()

import jax  # noqa: E402

from common.command_line import imported, parse  # noqa: E402
from common.processes import leave, one_run  # noqa: E402
from mpjax.data import Corpus  # noqa: E402
from mpjax.data.cache import checksum  # noqa: E402
from mpjax.errors import ConfigError, TrainingStopped  # noqa: E402
from mpjax.files import private_folder  # noqa: E402
from mpjax.models import Decoder, Encoder, Recurrent, Seq2Seq, decoder  # noqa: E402
from mpjax.precision import Precision  # noqa: E402
from mpjax.train.report import steady_terminal  # noqa: E402
from mpjax.typing import Json, Settings  # noqa: E402

Network = Decoder | Encoder | Recurrent | Seq2Seq


def guard_compiled() -> None:
    """Makes the folder of XLA's compiled programs, which are run unread, its owner's alone.

    Raises:
      ConfigError: somebody else may have filled it.
    """
    folder, ours = Path(os.environ[COMPILED]), os.environ[COMPILED] == our_compiled()
    with contextlib.suppress(OSError):  # JAX warns and goes on without a cache
        for one in [folder.parent] * ours + [folder]:
            private_folder(one)
        if ours:
            folder.chmod(0o700)


def machine() -> str:
    """Returns devices and flags in one line."""
    device = jax.devices()[0]
    flags = os.environ["XLA_FLAGS"]
    return f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} cores, XLA_FLAGS={flags}"


def host_devices(mesh: str) -> None:
    """Makes as many devices of a CPU as a mesh has, unless XLA_FLAGS says how many there are.

    Call it before anything asks for devices; other platforms have what they have.

    Args:
      mesh: its text; `parse_mesh` says what is wrong with it.
    """
    if "xla_force_host_platform_device_count" in os.environ["XLA_FLAGS"]:
        return
    sizes = [part.partition("=")[2] for part in mesh.split(",")]
    if all(size.isdigit() for size in sizes):
        jax.config.update("jax_num_cpu_devices", max(1, math.prod(map(int, sizes))))


def wide() -> Console:
    """Returns a console for tables; a pipe is taken to be wide enough for them."""
    console = Console()
    return console if console.is_terminal else Console(width=130)


Warmup = Annotated[
    int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: fits the steps)")
]


class Warming(Protocol):
    """Settings with steps of warm-up, a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field]]
    WARMUP: ClassVar[int]

    @property
    def steps(self) -> int: ...

    @property
    def warmup(self) -> int | None: ...


def warmup(config: Warming) -> int:
    """Returns the steps of warm-up: those given, else the script's usual ones if they fit."""
    return min(config.WARMUP, config.steps // 2) if config.warmup is None else config.warmup


@functools.cache  # a comparison asks once for each run
def data_checksum(data: str) -> str:
    """Returns the checksum of the file that `FILE` or `FILE:COLUMN` names; empty if it is none."""
    for place in (data, data.rpartition(":")[0]):
        if place and Path(place).is_file():
            return checksum(Path(place))
    return ""


def settings(config: Warming, **more: Json) -> Settings:
    """Returns all settings as JSON-able values, the steps of warm-up written out."""
    values = dataclasses.asdict(config) | {"warmup": warmup(config)} | more
    files = [values["data"]] if "data" in values else [x.partition(":")[2] for x in values["tasks"]]
    if found := " ".join(filter(None, (data_checksum(str(file)) for file in files))):
        values["data_checksum"] = found
    if imported():
        values["imports"] = imported()
    return json.loads(json.dumps(values, default=str))


LARGEST = 2**31 - 1  # of int32, the dtype of seeds, counters and indices


def _check(config: object, names: Sequence[str], what: str, fits: Callable[[float], bool]) -> None:
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is None:  # left to the script
                continue
            if not (fits(number) and math.isfinite(number)):
                raise ConfigError(f"{name}: {number} is out of range; give a finite number {what}")
            if isinstance(number, int) and number > LARGEST:
                raise ConfigError(f"{name}: {number} does not fit int32; give at most {LARGEST}")


def positive(config: object, *names: str) -> None:
    """Checks that settings, or all entries of a tuple, are finite and above zero.

    Raises:
      ConfigError: one is not.
    """
    _check(config, names, "above 0", lambda number: number > 0)


def not_negative(config: object, *names: str) -> None:
    """Checks that settings are finite and zero or above.

    Raises:
      ConfigError: one is not.
    """
    _check(config, names, "of 0 or above", lambda number: number >= 0)


def not_empty(config: object, *names: str) -> None:
    """Checks that settings with several values have at least one.

    Raises:
      ConfigError: one has none.
    """
    for name in names:
        if not getattr(config, name):
            raise ConfigError(f"{name}: empty; give at least one, or leave --{name} out")


def distinct(config: object, *names: str) -> None:
    """Checks that settings with several values name none of them twice.

    Raises:
      ConfigError: one does.
    """
    for name in names:
        values = getattr(config, name)
        if len(set(values)) < len(values):
            raise ConfigError(f"{name}: {' '.join(values)}; name each arm once")


def writable(out: Path) -> None:
    """Makes the folder of a run, or says why it cannot be written.

    Raises:
      ConfigError: it is a file, or cannot be made or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(
            f"out: {out} cannot be written ({error.strerror}); choose another --out"
        ) from None


def make_decoder(work: Any, corpus: Corpus, precision: Precision) -> Decoder:
    """Returns the decoder of a workload with the vocabulary of its tokenizer."""
    return decoder(
        work.model, precision, vocabulary=corpus.tokenizer.vocab_size, layers=work.layers,
        width=work.width, heads=work.heads, context=work.seq,
    )  # fmt: skip


def _quiet_asyncio() -> None:
    """Hides the tracebacks that Orbax leaves on a full disk.

    It closes its event loop at the first array that cannot be written; the writes of the others
    then have nobody to report to, and each would print a traceback. The failure itself is raised
    when the save is waited for.
    """

    def unraisable(found: sys.UnraisableHookArgs) -> None:
        if str(found.exc_value) != "Event loop is closed":
            sys.__unraisablehook__(found)

    sys.unraisablehook = unraisable
    logging.getLogger("asyncio").addFilter(lambda r: "never retrieved" not in r.getMessage())


def command(main: Callable[[T], None], config: type[T]) -> None:
    """Runs an experiment from the command line; what the user can mend is one line, status 2."""
    logging.getLogger("mpjax").setLevel(logging.INFO)
    _quiet_asyncio()
    # A script with --out keeps running when its terminal closes.
    terminal = steady_terminal() if hasattr(config, "out") else contextlib.nullcontext()
    with terminal:
        _command(main, config)


def _command(main: Callable[[T], None], config: type[T]) -> None:
    try:
        arguments = parse(config)
        with one_run(arguments, guard_compiled):
            main(arguments)
    except (ConfigError, TrainingStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    except OSError as error:  # a full disk, a folder that vanished
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"error: {where}{error.strerror or error}; free some space or choose another place",
            file=sys.stderr,
        )
        leave(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        leave(130)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        sys.excepthook(*sys.exc_info())
        leave(1)
