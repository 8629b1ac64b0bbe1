"""assert_wire: whether a compiled step sends wider numbers than its Precision says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from mpjax.errors import ConfigError, brief, explains_calls
from mpjax.interpret.audit.audit import read_compiled
from mpjax.interpret.audit.collectives import SLICES, Collective
from mpjax.precision import Precision, get_precision
from mpjax.precision.rule import matches
from mpjax.typing import DTypeLike, PyTree

SMALL = 16384  # elements: statistics of tokens, gains of norms, scalars
_JUDGED = ("float64", "float32", "bfloat16", "float16")
# Axes that cut the batch, over which gradients of weights are summed.
_BATCH = {"data", "fsdp", SLICES}


@explains_calls
def assert_wire(
    step: Any,
    *args: PyTree,
    precision: str | Precision | None = None,
    allow: Iterable[str] = (),
) -> tuple[Collective, ...]:
    """Raises if a step sends wider floating-point numbers than its Precision says; for tests.

    Weights and activations are to be gathered in the compute dtype of their module, partial sums
    in its compute or output dtype, gradients of weights in `gradient_dtype`. A collective that no
    module is known of may be as wide as the widest of these if it reduces, and as the last rule if
    it gathers. Arrays of at most 16,384 elements, integers and flags are not judged.

    Args:
      step: a step of `mpjax.train.build` or `make_train_step`, on a mesh of TPU or GPU devices;
        those of a topology will do, and the step is compiled and not run.
      *args: its arguments; `jax.ShapeDtypeStruct` with shardings will do.
      precision: what is promised; by default the Precision of the step.
      allow: patterns of module paths that may be wider; grammar of rules.

    Returns:
      All collectives, small ones too.

    Raises:
      AssertionError: collectives that are too wide, each with its path and what to do.
      ConfigError: a step without a mesh, or on a mesh of CPU devices, whose compiler sends
        bfloat16 as float32.

    Example:
      >>> import optax
      >>> from mpjax.models import decoder
      >>> from mpjax.train import build
      >>> state, step = build(decoder("tiny", "bf16"), optax.adamw(1e-3))
      >>> ids = jnp.zeros((8, 16), jnp.int32)
      >>> assert_wire(step, state, {"inputs": ids, "targets": ids})
      Traceback (most recent call last):
      mpjax.errors.ConfigError: assert_wire: the step is on one device and sends nothing; ...
    """
    if isinstance(allow, str):
        raise ConfigError(f"assert_wire: allow={allow!r} is one text; write allow=[{allow!r}]")
    mesh = getattr(step, "mesh", None)
    if not hasattr(step, "compiled"):
        raise ConfigError(f"assert_wire: {brief(step)} is no step; give one of mpjax.train.build")
    for one in args:
        if isinstance(one, str | Precision):
            raise ConfigError(
                f"assert_wire: {brief(one)} is no argument of the step; write precision=..."
            )
    if mesh is None:
        raise ConfigError(
            "assert_wire: the step is on one device and sends nothing; build it on a mesh, such as"
            " mesh='fsdp=4,tensor=2'"
        )
    if mesh.devices.flat[0].platform == "cpu":
        raise ConfigError(
            "assert_wire: the compiler of a CPU sends bfloat16 as float32, and proves nothing;"
            " build the step on devices of a TPU or GPU, such as those of"
            " jax.experimental.topologies.get_topology_desc('v5e:2x4', platform='tpu')"
        )
    promised = step.optimizer.precision if precision is None else get_precision(precision)
    sent = read_compiled(step, args).collectives
    patterns = list(allow)
    wide = [
        f"\n  {one}; {promised.name or 'its Precision'} says {limit} bits: {_remedy(one)}"
        for one in sent
        if (limit := allowed_bits(one, promised)) is not None
        and _bits(one.dtype) > limit
        and not any(one.path and matches(pattern, one.path) for pattern in patterns)
    ]
    if wide:
        many = "1 collective is" if len(wide) == 1 else f"{len(wide)} collectives are"
        raise AssertionError(f"{many} too wide:{''.join(wide)}")
    return sent


def _bits(dtype: DTypeLike) -> int:
    return 8 * jnp.dtype(dtype).itemsize


def allowed_bits(one: Collective, precision: Precision) -> int | None:
    """Returns how wide a collective may be; None if it is not judged.

    Args:
      one: the collective.
      precision: what is promised.

    Example:
      >>> one = Collective("all-gather", "float32", 10**6, 4 * 10**6, "fsdp", "a/up", "forward", 1)
      >>> allowed_bits(one, get_precision("bf16")), allowed_bits(one, get_precision("fp32"))
      (16, 32)
    """
    if one.dtype not in _JUDGED or one.elements <= SMALL:
        return None
    reduces = one.kind in ("all-reduce", "reduce-scatter")
    summed = _bits(precision.gradient_dtype)
    if reduces and one.direction != "forward" and set(one.axes.split(",")) <= _BATCH:
        return summed
    path = "/".join(part for part in one.path.split("/") if not part.isdecimal())
    if not path:
        last = precision.rules[-1].policy
        if not reduces:
            return _bits(last.compute_dtype)
        return max(summed, *(_bits(rule.policy.compute_dtype) for rule in precision.rules))
    policy = precision.policy(path)
    compute = _bits(policy.compute_dtype)
    return max(compute, _bits(policy.output_dtype)) if reduces else compute


def _remedy(one: Collective) -> str:
    if one.kind in ("all-reduce", "reduce-scatter"):
        return "let the product in front of it emit this dtype, or set gradient_dtype"
    return "cast the array to the compute dtype before it is gathered"
