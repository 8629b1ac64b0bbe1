"""autocast: any function with its products in a low dtype and its delicate parts in float32."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from mpjax.errors import ConfigError, explains_calls
from mpjax.formats.checks import check_key
from mpjax.formats.delayed import AmaxHistory
from mpjax.interpret.autocast.evaluate import CastInterpreter
from mpjax.interpret.autocast.histories import Histories
from mpjax.interpret.autocast.rules import cast_rules
from mpjax.interpret.core.location import NO_AUTOCAST, Location
from mpjax.interpret.core.op_lists import make_lists
from mpjax.interpret.core.retrace import Result, cast
from mpjax.interpret.core.trace import P, Program, R, check_function, trace
from mpjax.precision import Precision
from mpjax.precision.rule import Rule
from mpjax.typing import DTypeLike, Key, ModelState, Settings

_log = logging.getLogger("mpjax.interpret")


def no_autocast(fn: Callable[P, R]) -> Callable[P, R]:
    """Returns a function that an `autocast` around it leaves as it was traced.

    Args:
      fn: any function of JAX arrays; inside, its arguments have the dtypes of a call without
        autocast.

    Raises:
      ConfigError: it is no function.

    Example:
      >>> import jax.numpy as jnp
      >>> keep = no_autocast(lambda x, w: x @ w)
      >>> f = autocast(lambda x, w: (x @ w, keep(x, w)), "bf16", restore_dtypes=False)
      >>> [y.dtype.name for y in f(jnp.ones((2, 2)), jnp.ones((2, 2)))]
      ['bfloat16', 'float32']
    """

    check_function("no_autocast", fn)

    @functools.wraps(fn)
    def apart(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.named_scope(NO_AUTOCAST):
            return fn(*args, **kwargs)

    return apart


@explains_calls
def autocast(
    fn: Callable[P, R],
    precision: DTypeLike | Settings | Precision,
    *,
    lists: str = "cuda",
    low: Iterable[str] = (),
    full: Iterable[str] = (),
    widest: Iterable[str] = (),
    rules: Sequence[str | Rule] = (),
    restore_dtypes: bool = True,
    key: Key | None = None,
) -> Callable[P, R]:
    """Returns a function that computes its products low and its delicate operations in float32.

    Nothing of the function is edited: it is traced, and its jaxpr is evaluated with casts put in.
    Products run in the low dtype, operations that lose digits or overflow (exp, log, sums, pow,
    softmax, cross-entropy ...) in float32, all others in the widest dtype of their inputs. Python
    numbers never widen. float64, integers and every cast in the jaxpr stay. What runs
    value by value and feeds float32 operations only runs in float32 too, so that a softmax or a
    norm that is no call in the jaxpr is exact.

    A cast to the dtype that a value had while it was traced leaves nothing in a jaxpr: in a
    float32 model `x.astype(float32)` cannot be seen, and only lists and rules can keep such a
    place in float32.

    What is one operation with rules of its own (a linear solve, a kernel) stays as it was traced;
    if it holds products, that is logged once, with the source line, and `audit` lists it as a leak.

    Args:
      fn: any function of JAX arrays.
      precision: `bf16`, `fp16`, a policy, a recipe or a `Precision`, of which its rules are read:
        loss scale, update rule, moments and the gradients' dtype are for `mpjax.optim.wrap` with
        the same Precision, which is logged. `fp32` leaves everything as it was traced but for
        `rules`: `**/mlp=bf16` computes some paths low, and a recipe alone (`**=r=fp8`) quantises
        products and leaves the rest in float32.
      lists: `cuda` or `cpu`, after PyTorch's lists for them.
      low: names of operations to run low; of primitives, or of functions that JAX keeps as a call.
      full: names of operations to run in float32.
      widest: names of operations to run in the widest dtype of their inputs.
      rules: `PATTERN=VALUE` by module path, first match wins: `**/head=fp32` leaves these paths as
        they were traced, `**/mlp=r=fp8` quantises their products.
      restore_dtypes: whether outputs get the dtypes that they had without autocast.
      key: random key for recipes that draw, such as int8 in its gradients; fold the step in. Each
        product has its own, the iterations of a loop share theirs.

    Returns:
      A function of the same arguments. It composes with grad (inside and outside), jit, vmap,
      checkpoint, scan and sharding. Under a recipe that takes its scales from past steps
      (`fp8-delayed`) it has `init_state(*args)`, takes `state=` and returns `(outputs, state)`, as
      a model of mpjax does: an `AmaxHistory` for each product, in a `scan` for each iteration.
      `mpjax.formats.end_step` ends a step; the amax of gradients are cotangents of the state.

    Raises:
      ConfigError: no function, an unknown dtype, list, name or path, a rule that a function alone
        cannot follow; when called, a function that cannot be traced, a state of another function.

    Example:
      >>> import jax.numpy as jnp
      >>> f = autocast(lambda x, w: jax.nn.softmax(x @ w), "bf16")
      >>> jaxpr = jax.make_jaxpr(f)(jnp.ones((2, 3)), jnp.ones((3, 4)))
      >>> [v.aval.dtype.name for e in jaxpr.eqns if e.primitive.name == "dot_general"
      ...  for v in e.invars]
      ['bfloat16', 'bfloat16']

    References:
      PyTorch documentation, Automatic Mixed Precision package, Autocast Op Reference.
    """
    check_function("autocast", fn)
    (where, note), names = cast_rules(precision, rules), make_lists(lists, low, full, widest)
    said: set[str] = set()
    if key is not None:
        check_key(key, "autocast")
    if note:
        _log.warning("%s", note)

    def evaluated(program: Program, histories: Histories | None = None) -> Result:
        interpreter = CastInterpreter(where, names, said, key, histories)
        no_bounds = [None] * len(program.args)
        found = interpreter.evaluate(program.closed, program.args, no_bounds, Location())
        where.check([path for path in interpreter.paths if path])
        if restore_dtypes:
            pairs = zip(found.outs, program.closed.out_avals, strict=True)
            return found._replace(outs=[cast(x, aval.dtype) for x, aval in pairs])
        return found

    @functools.wraps(fn)
    def cast_fn(*args: P.args, **kwargs: P.kwargs) -> R:
        program = trace("autocast", fn, args, kwargs, runs=True)
        return program.rebuild(evaluated(program).outs)

    if not where.keeps_history:
        return cast_fn
    if "state" in inspect.signature(fn).parameters:
        raise ConfigError(
            "autocast: the recipe keeps a state, which state= of the new function takes, and the"
            " function has an argument of that name; rename it"
        )

    def found_in(program: Program) -> Histories:
        histories = Histories()
        jax.eval_shape(
            lambda args: evaluated(program._replace(args=args), histories).outs, program.args
        )
        return histories

    @functools.wraps(fn)
    def with_state(*args: Any, state: ModelState = None, **kwargs: Any) -> Any:
        program = trace("autocast", fn, args, kwargs, runs=True)
        histories = found_in(program)
        histories.fill(state)
        found = evaluated(program, histories)
        return program.rebuild(found.outs), histories.filled(state, found.records)

    def init_state(*args: P.args, **kwargs: P.kwargs) -> tuple[AmaxHistory, ...]:
        """Returns the state before the first step, of arguments or their shapes."""
        return found_in(trace("autocast", fn, args, kwargs, runs=True)).empty()

    stateful: Any = with_state
    stateful.init_state = init_state
    return stateful
