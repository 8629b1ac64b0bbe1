"""audit: what a function really runs in which dtype, and where float32 leaks in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from mpjax.errors import ConfigError, explains_calls
from mpjax.interpret.audit import hlo
from mpjax.interpret.audit.casts import dead_casts, double_casts, low_reductions
from mpjax.interpret.audit.cost import MOVES, operations, size_in_bytes
from mpjax.interpret.audit.donation import undonated
from mpjax.interpret.audit.leaks import Cause, Leaks, remedy
from mpjax.interpret.audit.report import Audit, Cost, Leak, Product
from mpjax.interpret.core.dataflow import Flow, Step
from mpjax.interpret.core.location import unmatched
from mpjax.interpret.core.op_lists import PRODUCTS, is_product
from mpjax.interpret.core.platforms import check_platform
from mpjax.interpret.core.trace import Program, trace
from mpjax.precision.rule import matches
from mpjax.typing import DType, PyTree


@explains_calls
def audit(
    fn: Callable[..., PyTree],
    *args: PyTree,
    compiled: bool = False,
    platform: str | None = None,
    **kwargs: PyTree,
) -> Audit:
    """Returns what a function runs: FLOPs and bytes by dtype and module path, leaks, waste.

    The function is traced and nothing of it is run. A leak is a product in float32 in a program
    that has low-precision ones; it is reported once for each cause, with the source line where a
    low value became wide. Causes that reach less than 0.1 % of the product FLOPs, or less than
    5 % in products that sum nothing (the angles of rotary embeddings), are listed apart as minor.
    Regions of `no_autocast` are no leaks. The body of a scan counts as often as it runs, that of a
    `while` once, and every branch of a `cond` counts: `notes` says where a program has these. Of
    `jax.lax.platform_dependent` only the branch of one platform counts.

    Args:
      fn: any function that JAX can trace: a loss, its `jax.grad`, a training step.
      *args: its arguments; `jax.ShapeDtypeStruct` will do for arrays.
      compiled: also compile it and read the optimised HLO: for this backend, or a step of
        `mpjax.train` for the devices of its mesh, with what it sends between them. On CPU that is
        no oracle of dtype: bfloat16 becomes float32 there.
      platform: `cpu cuda rocm tpu`, the one whose branches count; by default the one where JAX
        runs.
      **kwargs: its arguments by name.

    Raises:
      ConfigError: a function that cannot be traced, a donated argument, or an unknown platform.

    Example:
      >>> import jax.numpy as jnp
      >>> def f(x, w, table):
      ...     h = x * jnp.tanh(table).astype(x.dtype)
      ...     return h.astype(jnp.float32) @ w.astype(jnp.float32) + (x @ w)
      >>> x = jnp.ones((4, 4), jnp.bfloat16)
      >>> with jax.numpy_dtype_promotion("standard"):
      ...     report = audit(f, x, x, jnp.ones((4, 4)))
      >>> sorted({leak.mechanism for leak in report.leaks}), report.share("bfloat16")
      (['cast'], 0.5)
    """
    where = check_platform("audit", platform)
    step: Any = fn
    is_step = hasattr(fn, "compiled") and hasattr(fn, "function")
    if is_step:
        more = () if step.frozen is None else (step.frozen,)
        program = trace("audit", step.function, (*args, *more), kwargs)
    else:
        program = trace("audit", fn, args, kwargs)
    optimised = None
    if compiled:
        optimised = read_compiled(step, args) if is_step else _compile(program)
    return _audit(fn, program, Flow(program, where), optimised)


def assert_low_precision(
    fn: Callable[..., PyTree],
    *args: PyTree,
    allow: Iterable[str] = (),
    platform: str | None = None,
    **kwargs: PyTree,
) -> None:
    """Raises if a function has float32 products that no pattern allows; for tests.

    Args:
      fn: any function that JAX can trace.
      *args: its arguments.
      allow: patterns of the module paths whose products may be wide, such as `decoder/head`;
        grammar of rules. Minor leaks (see `audit`) are always allowed.
      platform: the one whose branches count, as in `audit`.
      **kwargs: its arguments by name.

    Raises:
      AssertionError: leaks, each with line, path and remedy; or a program that has float32
        products only.
      ConfigError: a pattern that matches no path, or an unknown platform.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((4, 4), jnp.bfloat16)
      >>> assert_low_precision(lambda x: x @ x, x)
    """
    if isinstance(allow, str):
        raise ConfigError(
            f"assert_low_precision: allow={allow!r} is one text; write allow=[{allow!r}]"
        )
    where = check_platform("assert_low_precision", platform)
    program = trace("assert_low_precision", fn, args, kwargs)
    flow, patterns = Flow(program, where), list(allow)
    paths = [path for path in flow.paths if path]
    for pattern in patterns:
        if not any(matches(pattern, path) for path in paths):
            raise ConfigError(
                f"assert_low_precision: allow {pattern!r} matches no path of the function;"
                f" {unmatched(pattern, paths)}"
            )

    def allowed(product: Product) -> bool:
        return any(product.path and matches(pattern, product.path) for pattern in patterns)

    report = _audit(fn, program, flow, None)
    left = [leak for leak in report.leaks if not _is_allowed(leak, allowed, patterns)]
    if left:
        lines = "".join(f"\n  {leak}" for leak in left)
        raise AssertionError(f"{len(left)} leaks into {left[0].dtype} products:{lines}")
    wide = [product for product in report.products if not allowed(product)]
    if wide and not report.low:
        raise AssertionError(
            f"no low product: all {len(wide)} products run in"
            f" {' and '.join(sorted({d for p in wide for d in p.operands}))}, the first at"
            f" {wide[0].line}; cast its operands down, or wrap the function in mpjax.autocast"
        )


def _is_allowed(leak: Leak, allowed: Callable[[Product], bool], patterns: Sequence[str]) -> bool:
    """Whether all products of a leak are allowed; its own path, if its products are not known."""
    if leak.products:
        return all(map(allowed, leak.products))
    return any(leak.path and matches(pattern, leak.path) for pattern in patterns)


def _audit(fn: object, program: Program, flow: Flow, optimised: hlo.Optimised | None) -> Audit:
    products = {step: _product(step) for step in flow.steps if is_product(step.eqn)}
    whole = sum(s.location.loops for s in flow.steps if s.name in PRODUCTS and s not in products)
    if whole:
        flow.notes[f"{whole} products of integers count by their dtype, and can be no leaks"] = None
    total = sum(product.flops for product in products.values())
    lows: Counter[str] = Counter()
    for step, product in products.items():
        lows.update({str(x.aval.dtype): product.flops for x in step.ins[:2] if x.low})
    low = lows.most_common(1)[0][0] if lows else ""
    found = Leaks(flow)
    leaks: dict[bool, list[Leak]] = {False: [], True: []}  # whether they are minor
    for cause, steps in found.by_cause().items():
        low = low or cause.low  # a promotion may have left no product a low operand
        leak = _leak(cause, [products[step] for step in steps], total, low)
        leaks[found.is_minor(steps, total)].append(leak)
    major, minor = (tuple(sorted(each, key=lambda leak: -leak.flops)) for each in leaks.values())
    by_dtype, by_path = _costs(flow)
    return Audit(
        low=low,
        by_dtype=by_dtype,
        by_path=by_path,
        products=tuple(products.values()),
        leaks=major,
        minor=minor,
        double_casts=double_casts(flow),
        dead_casts=dead_casts(flow),
        low_reductions=low_reductions(flow),
        missing_donation=undonated(fn, program),
        notes=tuple(flow.notes),
        compiled=optimised,
    )


def _product(step: Step) -> Product:
    location, out = step.location, step.outs[0]
    goes_on = {
        reader.outs[0].aval.dtype if reader.name == "convert_element_type" else out.aval.dtype
        for reader in out.readers
    }
    stays = out.returned or out.joins or len(goes_on) != 1
    first, second = (str(x.aval.dtype) for x in step.ins[:2])
    return Product(
        path=location.path,
        direction="recomputed" if location.recomputed else location.direction,
        line=location.line,
        kind=step.name,
        operands=(first, second),
        accumulation=str(out.aval.dtype),
        output=str(out.aval.dtype if stays else goes_on.pop()),
        flops=operations(step.eqn) * location.loops,
        times=location.loops,
    )


def _leak(cause: Cause, products: list[Product], total: int, low: str) -> Leak:
    directions = {product.direction for product in products}
    flops = sum(product.flops for product in products)
    return Leak(
        mechanism=cause.mechanism,
        line=cause.line,
        path=cause.path,
        direction="backward" if directions == {"backward"} else "forward",
        dtype=cause.dtype,
        origin=cause.origin,
        remedy=remedy(cause, cause.low or low),
        products=tuple(products),
        flops=flops,
        share=flops / max(total, 1),
    )


def _costs(flow: Flow) -> tuple[dict[str, Cost], dict[str, dict[str, Cost]]]:
    by_dtype: dict[str, Cost] = {}
    by_path: dict[str, dict[str, Cost]] = {}

    def add(step: Step, dtype: DType, cost: Cost) -> None:
        for costs in (by_dtype, by_path.setdefault(step.location.path, {})):
            costs[str(dtype)] = costs.get(str(dtype), Cost()) + cost

    for step in flow.steps:
        loops, flops = step.location.loops, operations(step.eqn)
        if flops and step.name in PRODUCTS:
            widest = max((x.aval.dtype for x in step.ins[:2]), key=lambda d: d.itemsize)
            add(step, widest, Cost(products=flops * loops))
        elif flops:
            add(step, step.outs[0].aval.dtype, Cost(others=flops * loops))
        for value in (*step.ins, *step.outs) if step.name not in MOVES else ():
            if size := size_in_bytes(value.aval):
                add(step, value.aval.dtype, Cost(bytes=size * loops))
    return by_dtype, by_path


def read_compiled(step: Any, args: Sequence[PyTree]) -> hlo.Optimised:
    """Returns what the optimised HLO of a step holds, compiled for the devices of its mesh.

    Args:
      step: a `TrainStep`.
      args: its arguments.
    """
    mesh = step.mesh
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    text = step.compiled.lower(*args).compile().as_text() or ""
    return hlo.read(text, platform, {} if mesh is None else dict(mesh.shape))


def _compile(program: Program) -> hlo.Optimised:
    lowered = jax.jit(jaxpr_as_fun(program.closed)).lower(*program.args)
    return hlo.read(lowered.compile().as_text() or "", jax.default_backend())
