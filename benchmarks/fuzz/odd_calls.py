"""Wrong calls of the public functions from Python: each is one line of a ConfigError, or is taken.

Each right call below is bent in every way of `bent`: an unknown name, an argument left out, one too
many, and each argument replaced by what somebody tired may pass. Nothing here is random.

Run:       python -m benchmarks.fuzz.odd_calls
Expected:  no traceback: of about 1,400 calls each is taken or refused in one line. Exit code 1
           where one is not, with the calls.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mpjax
from mpjax import models, optim, targets, tasks, train
from mpjax.errors import ConfigError, TrainingStopped

ODD: dict[str, Any] = {
    "None": None, "text": "abc", "empty text": "", "7": 7, "-1.5": -1.5, "nan": float("nan"),
    "True": True, "list": [], "list of texts": ["a"], "dict": {}, "object": object(),
    "array": np.zeros((3, 2), np.float32), "tuple": (1, 2), "function": len, "class": dict,
    "bytes": b"x", "path": Path("none"),
}  # fmt: skip
X, W, KEY = jnp.ones((2, 3)), jnp.ones((3, 4)), jax.random.key(0)
PARAMS = {"w": jnp.ones((3, 4))}
IDS = np.zeros((1, 3), np.int32)
BATCH = {"inputs": IDS, "targets": IDS}
Case = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def total(params: Any, *args: Any) -> Any:
    """A loss."""
    return jnp.sum(params["w"])


def layer(x: Any, w: Any) -> Any:
    """A product."""
    return x @ w


@functools.cache
def right_calls() -> dict[str, Case]:
    """Name -> a function, and arguments that it takes; each call takes milliseconds."""
    sgd, model = optax.sgd(0.1), models.decoder("tiny", layers=1, width=8, heads=2, vocabulary=9)
    encoder = models.encoder("bert-tiny", layers=1, width=8, heads=2, vocabulary=9, head="class")
    opt = optim.wrap(sgd, "fp16")
    state, params = opt.init(PARAMS), model.init(KEY)
    _, grads = opt.value_and_grad(total)(state, PARAMS)
    task = tasks.TextClassification(("a", "b"))
    return {
        "wrap": (optim.wrap, (sgd, "bf16"), dict(clip=1.0, patience=3, seed=0)),
        "init": (opt.init, (PARAMS,), {}),
        "step": (opt.step, (grads, state, PARAMS), {}),
        "value_and_grad": (lambda s: opt.value_and_grad(total)(s, PARAMS), (state,), {}),
        "make_optimizer": (optim.make_optimizer, ("adamw", 1e-3),
                           dict(schedule="linear", steps=9, warmup=2, weight_decay=0.1)),
        "store_weights": (optim.store_weights, (PARAMS, "e4m3"), {}),
        "quantize_moments": (optim.quantize_moments, (optax.adam(1e-3),), dict(first="int8")),
        "scaled_value_and_grad": (
            lambda scale: optim.scaled_value_and_grad(total)(scale, PARAMS),
            (optim.StaticLossScale(8.0),), {},
        ),
        "DynamicLossScale": (optim.DynamicLossScale, (8.0,), dict(growth_interval=5)),
        "StaticLossScale": (optim.StaticLossScale, (8.0,), {}),
        "LogMaxLossScale": (optim.LogMaxLossScale, ("float16",), {}),
        "LeafLossScale": (optim.LeafLossScale, (["**"],), {}),
        "get_precision": (
            mpjax.get_precision, ("bf16",),
            dict(rules=["**/norm*=fp32"], loss_scale="none", moments="int8", update="none"),
        ),
        "round_to": (mpjax.round_to, (X, "e4m3"), dict(rounding="nearest", saturate=True)),
        "quantize": (mpjax.quantize, (X, "e4m3"), dict(scaling="row", axis=1)),
        "dot_general": (mpjax.dot_general, (X, W, (((1,), (0,)), ((), ())), "fp8"), {}),
        "autocast": (mpjax.autocast, (layer, "bf16"), dict(low=(), rules=(), lists="cuda")),
        "monitor": (mpjax.monitor, (layer,), dict(sample=4)),
        "audit": (lambda platform: mpjax.audit(layer, X, W, platform=platform), ("cpu",), {}),
        "decoder": (models.decoder, ("tiny", "bf16"), dict(layers=1, width=8, heads=2)),
        "encoder": (models.encoder, ("bert-tiny", "bf16"), dict(layers=1, width=8, head="class")),
        "decoder.apply": (shaped(model.apply, params), (IDS,), {}),
        "decoder.loss": (shaped(model.loss, params), (BATCH,), {}),
        "encoder.apply": (shaped(encoder.apply, encoder.init(KEY)), (IDS,), {}),
        "of a batch": (shaped_field(model.loss, params, BATCH), (IDS, IDS), {}),
        "check_batch": (model.check_batch, (BATCH,), {}),
        "left_pad": (models.left_pad, ([[1, 2]],), dict(length=4)),
        "init_state": (train.init_state, (PARAMS, opt), dict(seed=0)),
        "make_train_step": (train.make_train_step, (total, opt), dict(accumulate=1)),
        "parse_mesh": (train.parse_mesh, ("data=1",), {}),
        "build_abstract": (train.build_abstract, (model, sgd), dict(clip=1.0, accumulate=1)),
        "parse_target": (targets.parse_target, ("v5e:4x4",), {}),
        "read_chip": (targets.read_chip, ("v5e",), {}),
        "MetricsWriter.write": (writer().write, ({"step": 1, "loss": jnp.float32(2)},), {}),
        "TextClassification": (tasks.TextClassification, (("a", "b"),), {}),
        "objective": (task.objective, (encoder,), {}),
        "Recipe": (mpjax.Recipe, ("mine", *3 * [(mpjax.Operand("e4m3"), mpjax.Operand("e4m3"))]),
                   {}),
        "Format": (mpjax.Format, ("e4m3",), {}),
    }  # fmt: skip


def writer() -> Any:
    """A writer of metrics to a folder that is not there yet."""
    return train.MetricsWriter(Path(mkdtemp()) / "a" / "b", {})


def shaped(fn: Callable[..., Any], params: Any) -> Callable[..., Any]:
    """The function of what follows the weights, traced and not run."""

    def traced(inputs: Any) -> Any:
        return jax.eval_shape(lambda p: fn(p, inputs)[0], params)

    return traced


def shaped_field(fn: Callable[..., Any], params: Any, batch: dict[str, Any]) -> Callable[..., Any]:
    """The function of the fields of a batch."""

    def traced(inputs: Any, targets: Any) -> Any:
        return shaped(fn, params)(batch | {"inputs": inputs, "targets": targets})

    return traced


def bent(case: Case) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yields what was bent in a right call, and the wrong call."""
    fn, args, kwargs = case
    own = fn.__init__ if inspect.isclass(fn) else fn
    ours = hasattr(own, "__wrapped__")
    if ours:  # of other functions the signature is Python's business
        yield "unknown name", lambda: fn(*args, **kwargs, clip_norms=1)
        yield "nothing", lambda: fn()
        yield "too many", lambda: fn(*args, *range(20), **kwargs)
    for number in range(len(args)):
        for name, odd in ODD.items():
            yield (
                f"{number}: {name}",
                functools.partial(fn, *args[:number], odd, *args[number + 1 :], **kwargs),
            )
    for key in kwargs:
        for name, odd in ODD.items():
            yield f"{key}: {name}", functools.partial(fn, *args, **kwargs | {key: odd})


def outcome(call: Callable[[], Any]) -> str:
    """`taken`, `refused`, or what is wrong with how it was refused."""
    try:
        call()
    except (ConfigError, TrainingStopped) as error:
        said = str(error)
        fits = said and len(said) < 700 and "\n" not in said
        return "refused" if fits else f"a message of {len(said)} characters: {said[:80]}"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return "taken"


def main() -> int:
    """Prints what happened; returns the exit code."""
    found, wrong = Counter[str](), []
    for name, case in right_calls().items():
        if (said := outcome(functools.partial(case[0], *case[1], **case[2]))) != "taken":
            wrong.append(f"{name}, the right call: {said}")
        for what, call in bent(case):
            said = outcome(call)
            found[said if said in ("taken", "refused") else "wrong"] += 1
            if said not in ("taken", "refused"):
                wrong.append(f"{name}, {what}: {said}")
    print(f"{found.total()} calls: {dict(found)}")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
