"""What a compiled program sends between devices, read from its optimised HLO."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from mpjax.precision.policy import CARRIED

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CALL = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((.*)")
# Between slices of TPUs a host receives what is exchanged; the program holds that of one slice.
_RECEIVED = re.compile(r"= (.*?) recv\(.*_xla_megascale_transfer_type=\"(\w+)\"")
SLICES = "slices"
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
BEGINS = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r" \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_TRANSFORM = re.compile(r"\b(?:transpose|jvp|vmap)\(([^()]*)\)")
_NOT_MODULES = re.compile(
    r"^(while|body|cond|closed_call|checkpoint|remat\w*|branch_\d+_fun|shard_map|\w+\(.*\))$"
)
Groups = frozenset[frozenset[int]]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Arrays of one dtype that devices exchange at once.

    Args:
      kind: one of `KINDS`.
      dtype: on the wire.
      elements: of the whole: what a gather makes, what a reduction reduces.
      bytes: of these elements.
      axes: of the mesh, such as `fsdp` or `data,fsdp`; `slices` for an exchange between slices of
        TPUs; `?` for groups that are no axes.
      path: module path, empty outside every module and where the compiler joined several.
      direction: `forward`, `backward`, or empty where nothing is known.
      times: how often it runs in one call.
    """

    kind: str
    dtype: str
    elements: int
    bytes: int
    axes: str
    path: str
    direction: str
    times: int

    def __str__(self) -> str:
        where = f" at {self.path}" if self.path else ""
        often = f", {self.times} times" if self.times > 1 else ""
        return (
            f"{self.kind} of {self.elements:,} {self.dtype} over {self.axes}"
            f"{where}{f' ({self.direction})' if self.direction else ''}{often}"
        )


def collectives(text: str, mesh: Mapping[str, int] | None = None) -> tuple[Collective, ...]:
    """Reads the collectives of an optimised program.

    Args:
      text: `compiled.as_text()`.
      mesh: axis -> devices, the last one fastest, in the order of the program's devices.

    Example:
      >>> name = 'metadata={op_name="jit(f)/mlp/up/dot_general"}'
      >>> line = "%g = bf16[8,8] all-gather(%a), replica_groups={{0,1,2,3}}, " + name
      >>> print(*collectives(line, {"data": 1, "fsdp": 4}))
      all-gather of 64 bfloat16 over fsdp at mlp/up (forward)
    """
    from mpjax.probe import HLO_NAMES  # a command, which no package loads before it runs

    shape = dict(mesh or {})
    times, found = runs(text), dict[tuple[str, ...], list[Collective]]()
    computation = ""
    for line in text.splitlines():
        if begins := BEGINS.match(line):
            computation = begins[2]
        if received := _RECEIVED.search(line):
            result, kind = received.groups()
            found[line, "recv"] = [_from_slices(line, result, kind, times.get(computation, 1))]
        if not (call := _CALL.search(line)):
            continue
        result, kind, start, rest = call.groups()
        arrays = _ARRAY.findall(result)
        if start and kind in ("all-gather", "collective-permute"):
            arrays = arrays[len(arrays) // 2 :] if kind == "all-gather" else arrays[1:2]
        groups, size = _groups(rest)
        if kind == "reduce-scatter" and start:  # the wholes, and behind them the parts
            arrays, size = arrays[: len(arrays) // 2], 1
        sizes: dict[str, int] = {}
        for dtype, dims in arrays:
            count = math.prod(int(n) for n in dims.split(",") if n)
            sizes[dtype] = sizes.get(dtype, 0) + count * (size if kind == "reduce-scatter" else 1)
        name = re.search(r'op_name="([^"]*)"', rest)
        path, direction = place_of(name[1] if name else "")
        channel = re.search(r"channel_id=(\d+)", rest)
        # Parts of one asynchronous collective stand in several computations.
        key = (channel[1] if channel else line, kind, result, name[1] if name else "")
        if key in found:
            continue
        found[key] = [
            Collective(
                kind, HLO_NAMES.get(dtype, dtype), count, math.ceil(count * bits_of(dtype) / 8),
                _axes(groups, shape), path, direction, times.get(computation, 1),
            )
            for dtype, count in sizes.items()
        ]  # fmt: skip
    return tuple(itertools.chain.from_iterable(found.values()))


def _from_slices(line: str, result: str, kind: str, times: int) -> Collective:
    """An exchange between slices, from the line that receives it."""
    from mpjax.probe import HLO_NAMES  # a command, which no package loads before it runs

    dtype, dims = _ARRAY.findall(result)[0]
    count = math.prod(int(n) for n in dims.split(",") if n)
    name = re.search(r'op_name="([^"]*)"', line)
    return Collective(
        kind.lower().replace("_", "-"), HLO_NAMES.get(dtype, dtype), count,
        math.ceil(count * bits_of(dtype) / 8), SLICES, *place_of(name[1] if name else ""), times,
    )  # fmt: skip


def bits_of(dtype: str) -> int:
    """How many bits a number of a dtype of HLO takes."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


def runs(text: str) -> dict[str, int]:
    """Returns how often each computation of an optimised program runs.

    A loop whose length is not written down runs as often as the one number in its condition says;
    where there are several, or none, its body counts once.
    """
    limits = _numbers_in(text)
    calls: dict[str, list[tuple[str, int]]] = {}
    own, entry = "", ""
    for line in text.splitlines():
        if begins := BEGINS.match(line):
            own = begins[2]
            entry = own if begins[1] else entry
            calls.setdefault(own, [])
            continue
        names = calls_of(line)
        count = 1
        if " while(" in line:
            trips, condition = _TRIPS.search(line), re.search(r"condition=%?([\w.\-]+)", line)
            known = limits.get(condition[1], set()) if condition else set()
            count = int(trips[1]) if trips else max(known) if len(known) == 1 else 1
        calls.setdefault(own, []).extend((name, count) for name in names)
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        if count > times.get(name, 0):
            times[name] = count
            for called, trips in calls.get(name, ()):
                visit(called, count * trips)

    if entry:
        visit(entry, 1)
    return times


def calls_of(line: str) -> list[str]:
    """The computations that an instruction calls."""
    names = _CALLED.findall(line)
    for group in _BRANCHES.findall(line):
        names += re.findall(r"%?([\w.\-]+)", group)
    return names


def _numbers_in(text: str) -> dict[str, set[int]]:
    """The whole numbers above 1 that each computation holds as constants."""
    found: dict[str, set[int]] = {}
    own = ""
    for line in text.splitlines():
        if begins := BEGINS.match(line):
            own = begins[2]
        elif constant := re.search(r"= s32\[\]\S* constant\((\d+)\)", line):
            if int(constant[1]) > 1:
                found.setdefault(own, set()).add(int(constant[1]))
    return found


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n]


def _laid(dims: list[int], order: list[int]) -> np.ndarray:
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(order) if order else ids


def _groups(rest: str) -> tuple[Groups, int]:
    """Which devices exchange with which, and how many of them do."""
    if listed := _LISTED.search(rest):
        groups = [_numbers(part) for part in re.findall(r"\{([\d,]*)\}", listed[1])]
    elif iota := _IOTA.search(rest):
        rows, columns = int(iota[1]), int(iota[2])
        ids = _laid(_numbers(iota[3]), _numbers(iota[4]))
        groups = ids.reshape(rows, columns).tolist()
    elif meshed := _MESH.search(rest):
        dims = {n: int(k) for n, k in re.findall(r"'([^']+)'=(\d+)", meshed[1])}
        ids = np.arange(math.prod(dims.values()))
        if meshed[2]:
            ids = _laid(_numbers(meshed[2]), _numbers(meshed[3])).reshape(-1)
        used = re.findall(r"'([^']+)'(:?)", meshed[4])
        if any(part for _, part in used):  # a part of an axis
            return frozenset(), 1
        last = [list(dims).index(name) for name, _ in used]
        first = [i for i in range(len(dims)) if i not in last]
        shaped = ids.reshape(list(dims.values())).transpose([*first, *last])
        groups = shaped.reshape(-1, math.prod(shaped.shape[len(first) :])).tolist()
    elif pairs := _PAIRS.search(rest):
        return _joined([_numbers(part) for part in re.findall(r"\{([\d,]*)\}", pairs[1])]), 1
    else:
        return frozenset(), 1
    return frozenset(map(frozenset, groups)), max(map(len, groups), default=1)


def _joined(pairs: list[list[int]]) -> Groups:
    """The sets of devices that pairs connect."""
    groups: list[set[int]] = []
    for pair in pairs:
        near = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in near]
        groups.append(set(pair).union(*near))
    return frozenset(map(frozenset, groups))


def _axes(groups: Groups, mesh: Mapping[str, int]) -> str:
    """The axes of a mesh along which groups of devices lie."""
    names = [name for name, size in mesh.items() if size > 1]
    ids = np.arange(math.prod(mesh.values())).reshape(list(mesh.values()))
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            last = [list(mesh).index(name) for name in chosen]
            first = [i for i in range(len(mesh)) if i not in last]
            size = math.prod(mesh[name] for name in chosen)
            rows = ids.transpose([*first, *last]).reshape(-1, size)
            # The program of one of several slices holds the groups of this slice.
            if groups and groups <= frozenset(map(frozenset, rows.tolist())):
                return ",".join(chosen)
    return "?"


def place_of(name: str) -> tuple[str, str]:
    """Returns the module path and the direction that an `op_name` says."""
    if not name:
        return "", ""
    transposed = "transpose(" in name
    if ":" in name:  # operations of several places
        return "", "backward" if transposed else ""
    while (inner := _TRANSFORM.sub(r"\1", name)) != name:
        name = inner
    names, before = list[str](), ""
    for part in name.split("/")[1:-1]:  # without the program and the operation
        if part and part != CARRIED and not _NOT_MODULES.match(part):
            if not (before and part.startswith(f"{before}.")):
                names.append(part)
            before = part
    return "/".join(names), "backward" if transposed else "forward" if names else ""
