"""The loss of labels: the numpy mean over targets, and nothing of what is ignored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mpjax.data.buckets import IGNORE
from mpjax.precision import parse_policy
from mpjax.tasks.labels import encoder_inputs, label_loss

pytestmark = pytest.mark.usefixtures("fast_compile")
DRAW = np.random.default_rng(0)
LOGITS = DRAW.normal(size=(3, 5, 7)).astype(np.float32)
LABELS = DRAW.integers(0, 7, (3, 5)).astype(np.int32)
LABELS[1, 2:] = IGNORE
LABELS[2] = IGNORE
F32 = parse_policy("f32")


def numpy_loss(logits, labels):
    x = logits.astype(np.float64)
    log_z = np.log(np.exp(x).sum(-1))
    picked = np.take_along_axis(x, np.maximum(labels, 0)[..., None], -1)[..., 0]
    return (log_z - picked)[labels != IGNORE].mean()


def test_it_is_the_mean_over_targets():
    want = numpy_loss(LOGITS, LABELS)
    assert float(label_loss(LOGITS, LABELS, F32)) == pytest.approx(want, rel=1e-6)
    over_rows = np.mean([numpy_loss(x, y) for x, y in zip(LOGITS[:2], LABELS[:2], strict=True)])
    assert abs(over_rows - want) > 1e-3, "a mean of means would be another number"
    one = float(label_loss(LOGITS[:, 0], LABELS[:2, 0].repeat(2)[:3], F32))
    assert one == pytest.approx(numpy_loss(LOGITS[:, 0], LABELS[:2, 0].repeat(2)[:3]), rel=1e-6)


def test_what_is_ignored_has_no_gradient_even_when_it_is_infinite():
    broken = LOGITS.copy()
    broken[2] = np.inf
    grad = jax.grad(lambda x: label_loss(x, jnp.asarray(LABELS), F32))
    clean, dirty = grad(jnp.asarray(LOGITS)), grad(jnp.asarray(broken))
    assert not np.asarray(clean)[LABELS == IGNORE].any()
    kept = LABELS != IGNORE
    assert np.array_equal(np.asarray(clean)[kept], np.asarray(dirty)[kept])
    assert np.asarray(clean)[kept].any()
    assert float(label_loss(LOGITS, np.full_like(LABELS, IGNORE), F32)) == 0


def test_low_logits_are_widened_before_the_loss():
    low = jnp.asarray(LOGITS, jnp.bfloat16)
    loss = label_loss(low, LABELS, F32)
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(numpy_loss(np.asarray(low, np.float32), LABELS), rel=1e-6)


def test_labels_stay_out_of_the_models_sight():
    batch = {"ids": 1, "keep": 2, "labels": 3, "next": 4}
    assert encoder_inputs(batch) == {"ids": 1, "keep": 2}
