"""Orbax as this package uses it: a writer with a keep policy, a reader, and its log kept quiet."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import PolicyCheckpointInfo

from mpjax.errors import ConfigError
from mpjax.train.checkpoint import leaves
from mpjax.typing import Json

TEMPORARY = ocp.utils.TMP_DIR_SUFFIX  # ends the name of a step folder that is not committed
META_FILE = "meta/meta.json"
# What Orbax, TensorStore and the file system raise when a folder cannot be written or read.
ERRORS = (OSError, ValueError, KeyError, RuntimeError)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = ("No space left", "ENOSPC", "Disk quota", "EDQUOT", "File too large", "EFBIG")


class OrbaxLog(logging.Filter):
    """Moves Orbax's records from the absl logger to `mpjax.train.orbax`, level DEBUG.

    Orbax prints tracebacks of errors that it also raises, and warnings that no user can act on.
    Other users of absl's logger are not touched.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the absl logger may handle a record: every one that is not Orbax's."""
        if "orbax" not in Path(record.pathname).parts:
            return True
        logging.getLogger("mpjax.train.orbax").debug("%s", record.getMessage())
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax's log quiet inside the block."""
    log = OrbaxLog()
    logging.getLogger("absl").addFilter(log)
    try:
        yield
    finally:
        logging.getLogger("absl").removeFilter(log)


class Keep:
    """Orbax's preservation policy as a function: the steps -> those to keep."""

    def __init__(self, choose: Callable[[list[int]], set[int]]) -> None:
        self._choose = choose

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: object
    ) -> list[bool]:
        """Returns for each checkpoint, oldest first, whether it stays."""
        chosen = self._choose([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in chosen for checkpoint in checkpoints]


class WriteErrors:
    """The first error of a write of this process, as soon as it is known.

    With several processes Orbax raises it after all of them have met, which the others, who wait
    for this one's files, never do.
    """

    def __init__(self) -> None:
        self.first: BaseException | None = None

    def add(self, error: BaseException) -> None:
        """Remembers an error."""
        self.first = self.first or error


class _Watched:
    """A future of Orbax's whose error is remembered."""

    def __init__(self, future: ocp.future.Future, errors: WriteErrors) -> None:
        self._future, self._errors = future, errors

    def result(self, timeout: float | None = None) -> object:
        """See Orbax's `Future`."""
        try:
            return self._future.result(timeout)
        except BaseException as error:
            self._errors.add(error)
            raise

    def cancel(self) -> bool | None:
        """See Orbax's `Future`."""
        return self._future.cancel()


async def _watched(
    save: Awaitable[list[ocp.future.Future] | None], errors: WriteErrors
) -> list[_Watched]:
    try:
        return [_Watched(future, errors) for future in await save or ()]
    except BaseException as error:
        errors.add(error)
        raise


class _StateHandler(ocp.PyTreeCheckpointHandler):
    def __init__(self, errors: WriteErrors) -> None:
        super().__init__()
        self._errors = errors

    async def async_save(self, *args: Any, **options: Any) -> list[_Watched]:
        """As Orbax's; its errors are remembered."""
        return await _watched(super().async_save(*args, **options), self._errors)


class _MetaHandler(ocp.JsonCheckpointHandler):
    def __init__(self, errors: WriteErrors) -> None:
        super().__init__(Path(META_FILE).name)
        self._errors = errors

    async def async_save(self, *args: Any, **options: Any) -> list[_Watched]:
        """As Orbax's; its errors are remembered."""
        return await _watched(super().async_save(*args, **options), self._errors)


def open_writer(
    root: Path,
    choose: Callable[[list[int]], set[int]],
    before_commit: Callable[[], None],
    errors: WriteErrors,
) -> ocp.CheckpointManager:
    """Returns Orbax's manager over a folder.

    Args:
      root: an absolute path that exists.
      choose: the steps there are -> the steps to keep, asked at each save.
      before_commit: called in the background when all files of a step are written and the
        temporary folder is about to be renamed; an error in it fails the save.
      errors: what becomes of this process's writes.
    """

    def commit() -> None:
        try:
            before_commit()
        except BaseException as error:
            errors.add(error)
            raise

    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    registry.add("state", ocp.args.PyTreeSave, _StateHandler(errors))
    registry.add("meta", ocp.args.JsonSave, _MetaHandler(errors))
    return ocp.CheckpointManager(
        root,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=Keep(choose),
            lightweight_initialize=True,  # a damaged old step must not stop a new run
            save_root_metadata=False,
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=commit,
                # asynchronously, a folder that cannot be made is an error minutes later
                create_directories_asynchronously=False,
            ),
        ),
        handler_registry=registry,
    )


def make_page(
    table: Mapping[str, leaves.Leaf], meta: Mapping[str, Json], metrics: Mapping[str, float]
) -> dict[str, Json]:
    """Returns what `meta.json` holds of a step, as of now: the file is written later.

    Raises:
      ConfigError: meta or metrics are no JSON.
    """
    described = {name: leaves.describe(leaf) for name, leaf in table.items()}
    page = {"leaves": described, "metrics": dict(metrics), "meta": dict(meta)}
    try:
        return json.loads(json.dumps(page))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"meta: expected JSON values, got one that is not ({error})") from None


def write(
    writer: ocp.CheckpointManager, step: int, table: Mapping[str, jax.Array], page: dict[str, Json]
) -> None:
    """Starts the write of a step; returns when the arrays may be donated.

    On CPU Orbax writes from the arrays' own buffers: JAX does not reuse a buffer that is viewed
    from outside, so a donation in the meantime makes a new one.
    """
    # Orbax refuses arrays without elements; the page describes them
    arrays = {name: leaves.to_carrier(leaf) for name, leaf in table.items() if leaf.size}
    items = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(page))
    writer.save(step, args=items, force=True)  # the loop has decided when to save


def read(folder: Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads leaves of a committed step.

    Args:
      folder: the step's folder, absolute.
      wanted: path -> saved shape and dtype, with the sharding to read into.
    """
    stored = {name: leaves.carrier(leaf) for name, leaf in wanted.items() if leaf.size}
    arrays: dict[str, jax.Array] = {}
    if stored:
        with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(
                    item=stored,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(stored),
                    partial_restore=True,
                ),
            )
    return {
        name: leaves.from_carrier(arrays[name], leaf.dtype)
        if leaf.size
        else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        for name, leaf in wanted.items()
    }


def is_full(error: BaseException) -> bool:
    """Whether an error of a write means that the disk or the quota is full."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    if any(text in str(error) for text in _FULL_TEXTS):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_full(cause)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
