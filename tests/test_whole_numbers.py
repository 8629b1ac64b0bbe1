"""True and False are no whole numbers: every setting that is one refuses them, in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from mpjax import data, optim, train
from mpjax.data.augment import RandomCrop, contextual_replacement
from mpjax.errors import ConfigError, is_whole
from mpjax.finetuning import Finetuning, Tuned
from mpjax.formats.delayed import AmaxHistory
from mpjax.optim import pruned
from mpjax.optim.annealing import affine, alternate, anneal_then_descend, annealed, gaussian
from mpjax.precision import Moments, Recipe, Triggers
from mpjax.precision.moments import MomentFormat
from mpjax.report.curves import fitting
from mpjax.tasks.adversarial import PGD
from mpjax.tasks.distill.intermediates import check_layers

IDS = np.arange(40, dtype=np.int32)
EXAMPLES = [{"ids": IDS[:3], "labels": n % 2} for n in range(4)]
IMAGES = {"inputs": np.zeros((4, 2, 2, 1), np.float32), "targets": np.zeros(4, np.int32)}
ITEMS = data.Interactions(np.zeros(3, np.int32), IDS[:3], np.arange(3.0), tuple("abc"))
SGD = optax.sgd(0.1)


def of(function: Callable[..., Any], *args: Any, **usual: Any) -> dict[str, Callable[[Any], Any]]:
    """A call for each whole number among the keywords, which takes another value for it."""
    kind = getattr(function, "__name__", str(function))
    return {
        f"{kind}: {name}": lambda x, name=name: function(*args, **usual | {name: x})
        for name, value in usual.items()
        if type(value) is int
    }


def fitted(steps: Any, every: Any = 1) -> Any:
    step: Any = None
    return train.fit(step, step, [], steps=steps, report=print, every=((every, print),))


def answered(**settings: Any) -> Any:
    none: Any = None
    return Tuned(none, none, none, none, none, {}, 0, {}).predict(["a"], **settings)


def step_of(accumulate: Any) -> Any:
    return train.make_train_step(
        lambda *args, **kwargs: None, optim.wrap(SGD, "fp32"), accumulate=accumulate
    )


NO_PAIRS: Any = (None, None)
CALLS = {
    **of(data.bucket_batches, EXAMPLES, batch=2, seed=0, lengths=(4,), workers=0),
    **of(data.eval_batches, EXAMPLES, batch=2, lengths=(4,)),
    **of(data.mixed_batches, {"a": EXAMPLES}, batch=2, seed=0, lengths=(4,)),
    **of(data.packed_batches, [{"inputs": IDS, "targets": IDS}], batch=1, length=64, seed=0),
    **of(data.batches, IDS, batch=2, seq=4, seed=0),
    **of(data.validation_batches, IDS, batch=2, seq=4, limit=1),
    **of(data.image_batches, IMAGES, batch=2, seed=0, workers=0),
    **of(data.histories, ITEMS, ITEMS, longest=2),
    **of(data.candidates, [{"ids": [1]}] * 3, np.ones(3), negatives=1, length=2),
    **of(RandomCrop, padding=4),
    **of(optim.wrap, SGD, "fp32", patience=3),
    **of(optim.make_optimizer, "sgd", 0.1, steps=10, warmup=1),
    **of(optim.make_schedule, "linear", 0.1, steps=10, warmup=1),
    **of(annealed, gaussian(0.1), affine(1.0, 0.9), reheat=0, seed=0),
    **of(alternate, SGD, annealed(gaussian(0.1), affine(1.0, 0.9)), descend=1, anneal=1),
    **of(anneal_then_descend, annealed(gaussian(0.1), affine(1.0, 0.9)), SGD, after=1),
    **of(contextual_replacement, EXAMPLES, print, None, rate=0.1, batch=1, seed=0),
    **of(pruned, SGD, 0.5, begin=0, end=10, every=2),
    **of(Recipe, "mine", NO_PAIRS, NO_PAIRS, NO_PAIRS, hadamard=0, history=0, margin=0, chunk=128),
    **of(MomentFormat, "int8", block=256),
    **of(Moments, min_size=0),
    **of(Triggers, window=20, hold=3),
    **of(mpjax.DynamicLossScale, growth_interval=10, hysteresis=1),
    **of(AmaxHistory.empty, steps=4),
    **of(mpjax.monitor, jnp.sin, sample=4),
    **of(train.MetricsWriter, "never/made", {}, every=10),
    **of(train.Checkpointer, "never/made", keep=3, keep_best=0),
    **of(fitted, steps=1, every=1),
    **of(step_of, accumulate=1),
    **of(train.check_batch, batch=2, accumulate=1, mesh=None),
    **of(fitting, [], window=20),
    **of(answered, batch=2, tokens=3),
    **of(Finetuning, layers=1, width=1, heads=1, vocabulary=9, longest=4, batch=1, accumulate=1,
         steps=1, evaluate_every=1, patience=1, seed=0),
    **of(mpjax.models.encoder, "bert-tiny", layers=1, width=16, heads=2, vocabulary=9, context=8),
    **of(PGD, epsilon=0.1, steps=2),
}  # fmt: skip


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", list(CALLS))
def test_a_boolean_is_no_number(name: str, value: bool) -> None:
    with pytest.raises(ConfigError) as error:
        CALLS[name](value)
    setting = name.split(": ")[1].removeprefix("growth_").removesuffix("_size")
    assert str(value) in str(error.value) and "\n" not in str(error.value), error.value
    assert setting.split("_")[0] in str(error.value), error.value


def test_layers_lengths_and_what_is_whole() -> None:
    with pytest.raises(ConfigError, match="True"):
        data.bucket_batches(EXAMPLES, batch=2, seed=0, lengths=(True, 4))
    with pytest.raises(ConfigError, match="True"):
        check_layers(((True, 0),), 2, 2)
    assert is_whole(np.int64(3), 3) and not is_whole(2, 3) and not is_whole(3.0, 3)
    assert not is_whole(jnp.zeros(2)) and not is_whole(None) and not is_whole("3")
