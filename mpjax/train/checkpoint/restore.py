"""Restoring into other settings: what may differ, and how a state is cast to another Precision."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpjax.errors import ConfigError
from mpjax.train.checkpoint import leaves, recast
from mpjax.train.checkpoint.reader import CheckpointReader
from mpjax.train.checkpoint.replica_leaves import fits_other_replicas
from mpjax.typing import DType, Json, Params, PyTree, Tree

_ABSENT = "(not set)"


def compare_settings(
    saved: Mapping[str, Json],
    current: Mapping[str, Json],
    *,
    may_change: Iterable[str] = ("steps", "out"),
) -> None:
    """Refuses to resume with settings that differ from the saved ones.

    Both sides are compared as JSON, so a tuple equals a list; True differs from 1.

    Args:
      saved: the settings in the checkpoint, nested by name.
      current: the settings of this run.
      may_change: dotted names that may differ, each with all that lies below it.

    Raises:
      ConfigError: a setting differs; names each by its dotted name with both values.

    Example:
      >>> compare_settings({"model": {"width": 64}, "steps": 10}, {"model": {"width": 64}})
      >>> compare_settings({"model": {"width": 64}}, {"model": {"width": 128}})
      Traceback (most recent call last):
      mpjax.errors.ConfigError: resume: model.width was 64 at the save, is 128 now; give ...
    """
    if found := differences(saved, current, may_change):
        raise ConfigError(
            f"resume: {'; '.join(found)}; give the saved settings, or start a new run in another"
            " --out"
        )


def differences(
    saved: Mapping[str, Json], current: Mapping[str, Json], may_change: Iterable[str]
) -> list[str]:
    """Returns what `compare_settings` refuses: a text for each setting, with both values."""
    before, now = flat_settings(saved), flat_settings(current)
    allowed = tuple(may_change)
    return [
        f"{name} was {before.get(name, _ABSENT)} at the save, is {now.get(name, _ABSENT)} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
        and not any(name == other or name.startswith(f"{other}.") for other in allowed)
    ]


def flat_settings(settings: Mapping[str, Json], prefix: str = "") -> dict[str, str]:
    """Returns settings by their dotted names, each value as JSON."""
    table: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            table |= flat_settings(value, f"{prefix}{name}.")
        else:
            table[f"{prefix}{name}"] = json.dumps(value, sort_keys=True)
    return table


class LeafMatch(NamedTuple):
    """Where each leaf of a new state comes from.

    Args:
      fresh: path -> leaf of the new state.
      sources: path -> path in the checkpoint, None where it has none; without what `roots` hold.
      roots: optimizer states with low moments, now or in the checkpoint.
      lines: what begins anew although it is there.
    """

    fresh: dict[str, leaves.Leaf]
    sources: dict[str, str | None]
    roots: list[recast.Root]
    lines: list[str]


def match_leaves(state: PyTree, saved: recast.Shapes, nodes: Mapping[str, str]) -> LeafMatch:
    """Matches the leaves of a new state with those of a checkpoint, as `restore_into` does.

    Args:
      state: of the new Precision, abstract or real.
      saved: path -> shape and dtype in the checkpoint.
      nodes: what `describe_nodes` said at the save.
    """
    fresh, params = leaves.named_leaves(state), _params_of(state)
    masters = {path: name for name in saved if (path := _mirrored(name)) is not None}
    sources = {name: _source(name, leaf, saved, masters) for name, leaf in fresh.items()}
    roots = recast.find_roots(state, saved, nodes)
    for root in roots:  # low moments, now or then, are read as whole states
        for name in root.below(fresh):
            del sources[name]
    return LeafMatch(fresh, sources, roots, _without_history(state, params, sources, roots))


def restore_into(
    state: Tree, checkpointer: CheckpointReader, step: int | None = None
) -> tuple[Tree, list[str]]:
    """Restores a checkpoint into a state of another Precision, and says what it changed.

    Leaves are matched by tree path. A leaf of another dtype is cast. A float32 master copy
    (`.../master/PATH` in the optimizer state) stands for the weight `params/PATH` and the other
    way round: weights whose dtype changes come from the master where the checkpoint has one, and
    a master that it lacks is filled from the saved weights. Moments that were stored in another
    format are made float32 and stored as they are now; the counts that belong to them are kept.
    Where the checkpoint lacks a part of an optimizer's moments, such as after a change from Lion to
    Adam, all of that part's state begins anew, its count too: a count of old steps with new
    moments makes steps of many times the learning rate. Schedules have a count of their own.

    Args:
      state: a fresh state of the new Precision; its shardings are honoured. Leaves may be
        `jax.ShapeDtypeStruct` where the checkpoint has them.
      checkpointer: where to read.
      step: which step; None takes the newest.

    Returns:
      The state, and one line for each leaf that was not restored as it was saved: cast, taken
      from or filled as a master, left fresh, or dropped.

    Raises:
      ConfigError: nothing matches, a shape differs, a cast is between numbers of different
        kinds or overflows, or a leaf is neither saved nor fresh.
    """
    saved, nodes = checkpointer.read_leaves(step), checkpointer.read_nodes(step)
    fresh, sources, roots, lines = match_leaves(state, saved, nodes)
    where = f"{checkpointer.directory}"
    if not any(sources.values()) and not any(root.saved for root in roots):
        raise ConfigError(
            f"{where}: no leaf of the checkpoint has a path of this state ({min(saved)} there, "
            f"{min(fresh)} here); restore the same model"
        )
    _require_matches(where, fresh, saved, sources)
    wanted = {
        source: leaves.target(fresh[name], saved[source].dtype)
        for name, source in sources.items()
        if source is not None
    }
    for root in roots:
        wanted |= root.wanted(where, saved)
    read = checkpointer.read(wanted, step)
    restored: dict[str, leaves.Leaf] = {}
    for root in roots:
        found, said = root.recast(read, _params_of(state))
        restored |= found
        lines += said
    for name, source in sources.items():
        leaf = fresh[name]
        if source is None:
            restored[name] = leaf
            lines.append(f"{name}: not in the checkpoint, left fresh")
            continue
        restored[name] = _cast(name, read[source], leaf.dtype)
        if source != name:
            lines.append(f"{name}: from {source}, {saved[source].dtype} -> {leaf.dtype}")
        elif saved[name].dtype != leaf.dtype:
            lines.append(f"{name}: {saved[name].dtype} -> {leaf.dtype}")
    known = fresh.keys() | wanted.keys()
    lines += [f"{name}: only in the checkpoint, dropped" for name in saved if name not in known]
    values = [restored[name] for name in fresh]
    return jax.tree.unflatten(jax.tree.structure(state), values), lines


def _params_of(state: PyTree) -> Params:
    return state.get("params") if isinstance(state, dict) else getattr(state, "params", None)


def _without_history(
    state: PyTree, params: Params, sources: dict[str, str | None], roots: list[recast.Root]
) -> list[str]:
    """Leaves whole an optimizer's history fresh where the checkpoint lacks a part; says which."""
    owners = recast.history_owners(state, params)
    found = {name: source is not None for name, source in sources.items() if name in owners}
    places = {}
    for root in roots:
        for name, part in root.names().items():
            if name in owners:
                found[name], places[name] = part in root.saved, (root, part)
    lacking = {owners[name]: name for name, there in found.items() if not there}
    lines = []
    for name, there in found.items():
        if not there or owners[name] not in lacking:
            continue
        if name in places:
            root, part = places[name]
            del root.saved[part]
        else:
            sources.pop(name)
            sources[name] = None
        lines.append(f"{name}: begins anew, as {lacking[owners[name]]} is not in the checkpoint")
    return lines


def _mirrored(name: str) -> str | None:
    """Returns the weight whose float32 copy a leaf is, or None if it is no master."""
    parts = name.split("/")
    if "master" not in parts or parts[0] == "params":
        return None
    return "/".join(["params", *parts[parts.index("master") + 1 :]])


def _source(
    name: str, leaf: leaves.Leaf, saved: recast.Shapes, masters: Mapping[str, str]
) -> str | None:
    weight = _mirrored(name)
    if weight is not None and name not in saved:
        # the same master under another wrapping, else the weight itself
        return masters.get(weight, weight if weight in saved else None)
    if name in masters and (name not in saved or saved[name].dtype != leaf.dtype):
        return masters[name]
    return name if name in saved else None


def _require_matches(
    where: str,
    fresh: Mapping[str, leaves.Leaf],
    saved: recast.Shapes,
    sources: Mapping[str, str | None],
) -> None:
    for name, source in sources.items():
        leaf = fresh[name]
        if source is None:
            if name.startswith("local/params/"):
                raise ConfigError(
                    f"{where}: {name}, a weight of replicas that train apart, is not in the"
                    " checkpoint; restore into a state without diloco, and give its weights to"
                    " build(..., params=weights, diloco=...)"
                )
            parent = name.rpartition("/")[0]
            scaled = name.endswith(("/values", "/scales")) and parent in saved
            if scaled or f"{name}/values" in saved:
                which = (
                    "with scales here and without in" if scaled else "without scales here, not in"
                )
                raise ConfigError(
                    f"{where}: {parent if scaled else name} is stored {which} the checkpoint;"
                    " restore into its own p=, and store that with mpjax.optim.store_weights or"
                    " weight_view"
                )
            if isinstance(leaf, jax.ShapeDtypeStruct):
                raise ConfigError(
                    f"{where}: {name} is not in the checkpoint and has no fresh value; "
                    "pass an initialised state"
                )
        elif saved[source].shape != leaf.shape and not fits_other_replicas(
            name, saved[source], leaf
        ):
            raise ConfigError(
                f"{where}: {source} has shape {saved[source].shape} in the checkpoint, "
                f"{name} has {leaf.shape} here; restore the same model"
            )


def _cast(name: str, array: jax.Array, dtype: DType) -> jax.Array:
    if array.dtype == dtype:
        return array
    floating = [jnp.issubdtype(kind, jnp.floating) for kind in (array.dtype, dtype)]
    if floating != [True, True]:
        raise ConfigError(
            f"{name}: {array.dtype} in the checkpoint cannot be cast to {dtype}; only floats are "
            "cast, so restore with the saved format of this leaf"
        )
    cast = array.astype(dtype)  # the explicit purpose of this restore
    lost = jnp.isfinite(array) & ~jnp.isfinite(cast)
    if lost.any():
        raise ConfigError(
            f"{name}: {int(lost.sum())} values overflow {dtype}, whose largest is "
            f"{float(jnp.finfo(dtype).max):g}; restore it in a wider format"
        )
    return cast
