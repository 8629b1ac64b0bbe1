"""Adversarial training in the compiled step: precisions, meshes, skips, microbatches, mistakes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.data.buckets import IGNORE
from mpjax.errors import ConfigError
from mpjax.models import decoder, encoder, resnet, seq2seq
from mpjax.ops import Terms
from mpjax.precision import get_precision
from mpjax.tasks import (
    Adversarial,
    Language,
    MaskedLanguage,
    TextClassification,
    TextRegression,
    TokenClassification,
    label_loss,
)
from mpjax.tasks.adversarial import FGM, PGD, SMART, VAT, FreeLB, Method, RDrop
from mpjax.tasks.adversarial.adversarial import room
from mpjax.tasks.adversarial.perturbation import slope
from mpjax.train import build
from tests.tasks.adversarial.mean import BROKEN, Exact, batch_of, mean_encoder, size

pytestmark = pytest.mark.usefixtures("fast_compile")
TASK = TextClassification(tuple("abc"))
SMALL: Any = dict(layers=1, width=16, heads=2, vocabulary=40)
SPECIAL = (2,)


def classifier(precision: Any = "fp32", **changes: Any) -> Any:
    return encoder("bert-tiny", precision, head="class", classes=3, **SMALL, **changes)


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(jax.device_get(tree))]


MESH = "data=2,fsdp=2,tensor=2"


def test_it_trains_under_float16_on_a_mesh_in_one_program() -> None:
    """All methods and precisions: `python -m benchmarks.quality.adversarial`."""
    task = Adversarial(TASK, FreeLB(0.5, 0.3, 2), SPECIAL)
    state, step = build(classifier("fp16"), optax.adam(1e-2), MESH, objective=task.objective)
    batch = batch_of(8)
    losses, skipped = [], 0
    for _ in range(20):
        state, metrics = step(state, batch)
        skipped = int(metrics["skipped"])  # until the loss scale fits
        losses.append(float(metrics["loss"]))
        assert not float(metrics["adversarial/nonfinite"])
    assert np.isfinite(losses).all() and losses[-1] < 0.9 * losses[0]
    # A row that no table has is NaN: its example has no offset, and no update follows.
    before = bits((state.params, state.opt_state.inner, state.model_state))
    broken = batch | {"ids": batch["ids"].at[0, 1].set(99)}
    state, metrics = dataclasses.replace(step, check=None)(state, broken)
    assert int(metrics["skipped"]) == skipped + 1 and float(metrics["adversarial/nonfinite"]) >= 1
    assert bits((state.params, state.opt_state.inner, state.model_state)) == before
    assert step.compiled._cache_size() == 1


def offset_slopes(precision: str) -> Callable[[float], np.ndarray]:
    """Loss scale -> inner gradients of a classifier with the same weights in all precisions."""
    model, batch = classifier(precision), batch_of(8)
    inputs = {"ids": batch["ids"], "keep": batch["keep"]}
    chosen = room(batch["ids"], batch["keep"], SPECIAL)
    params = model.init(jax.random.key(0))

    def loss(offset: Any) -> Any:
        logits = model.apply(params, inputs | {"offset": offset})[0]["class"]
        # so small that float16 loses it without a scale
        policy = get_precision("fp32").policy("encoder/loss")
        return label_loss(logits, batch["labels"], policy) * jnp.float32(2.0**-18)

    found = jax.jit(lambda scale: slope(loss, jnp.zeros((8, 5, 16)), chosen, scale).gradient_BTD)
    return lambda scale: np.asarray(found(jnp.float32(scale)))


def test_a_scaled_inner_gradient_in_float16_is_that_of_float32() -> None:
    half = offset_slopes("fp16")
    exact, scaled = offset_slopes("fp32")(1.0), half(2.0**24)
    # the forward and backward pass round some ten times by 2^-11
    np.testing.assert_allclose(size(scaled), size(exact), rtol=5e-3)
    cosine = (scaled * exact).sum((1, 2)) / (size(scaled) * size(exact)).ravel()
    assert cosine.min() > 0.999
    # without a scale float16 has lost more than half of it
    lost = size(half(1.0)) / size(exact)
    assert np.abs(np.log2(np.maximum(lost, 1e-9))).max() > 1
    # normed before the unscaling, in float16, the sum of squares is not finite
    early = (exact * 2.0**34).astype(np.float16)
    with np.errstate(over="ignore"):
        assert not np.isfinite(np.sqrt((early * early).sum((1, 2), dtype=np.float16))).any()


def test_norms_under_float16_are_those_of_float32() -> None:
    norms = []
    for precision in ("fp32", "fp16"):
        task = Adversarial(TASK, PGD(0.2, 0.03, 2, clean=0.0), SPECIAL)  # inside of the ball
        model = classifier(precision)
        terms: Any = functools.partial(task.objective(model).terms, loss_scale=2.0**12)  # type: ignore[arg-type]
        metrics = jax.jit(lambda p, b, terms=terms: terms(p, b).metrics)
        found = metrics(model.init(jax.random.key(0)), batch_of(8))
        norms.append(float(found["adversarial/norm"]))
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert 0.03 < norms[0] < 0.06  # two steps that do not quite agree


def test_an_example_without_a_finite_gradient_is_not_moved_and_is_counted() -> None:
    model, batch = mean_encoder(), batch_of()
    batch["ids"] = batch["ids"].at[2, 1].set(BROKEN)
    params = model.init(jax.random.key(0))
    terms: Any = jax.jit(Adversarial(TASK, FGM(0.7), SPECIAL).objective(model).terms)
    found = terms(params, batch)
    exact = Exact(params, batch)
    g = exact.loss_slope(0.0)
    offset = 0.7 * g / size(g)
    offset[2] = 0.0
    assert float(found.losses["adversarial"]) == pytest.approx(exact.loss(offset), rel=1e-4)
    assert float(found.metrics["adversarial/nonfinite"]) == 1
    assert float(found.metrics["adversarial/norm"]) == pytest.approx(0.7 * 5 / 6, rel=1e-5)


def test_microbatches_weigh_by_their_targets() -> None:
    model, batch = mean_encoder(), batch_of(8)
    batch["labels"] = batch["labels"].at[:3].set(IGNORE)
    objective: Any = Adversarial(TASK, FGM(0.5), SPECIAL).objective(model)
    terms, params, ends = jax.jit(objective.terms), model.init(jax.random.key(0)), []
    for accumulate in (1, 2):
        parts = [{n: x[i::accumulate] for n, x in batch.items()} for i in range(accumulate)]
        found = [terms(params, part).losses for part in parts]
        counts = [objective.count(part) for part in parts]
        assert set(counts[0]) == {"clean", "adversarial"}
        ends.append({
            name: sum(float(c[name] * f[name]) for c, f in zip(counts, found, strict=True))
            / sum(float(c[name]) for c in counts)
            for name in counts[0]
        })  # fmt: skip
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


def tokens(shape: tuple[int, int] = (4, 5), seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).integers(5, 39, shape), jnp.int32)


def others() -> dict[str, tuple[Any, Any, Any, Method]]:
    """Task, model and batch of every other kind."""
    ids, keep = tokens(), jnp.ones((4, 5), bool)
    tags = jnp.where(ids % 2 == 0, ids % 3, IGNORE)
    small = lambda **c: encoder("bert-tiny", **SMALL, **c)  # noqa: E731
    read = {"ids": ids, "keep": keep}
    ahead = {"inputs": ids, "targets": tokens(seed=1)}
    return {
        "token": (TokenClassification(tuple("abc")), mean_encoder(),
                  read | {"labels": tags}, FGM(0.3)),
        "number": (TextRegression(), mean_encoder(classes=1),
                   read | {"values": jnp.arange(4.0)}, SMART()),
        "masked": (MaskedLanguage(), small(head="pretrain"),
                   read | {"labels": jnp.where(ids % 2 == 0, ids, IGNORE), "next": ids[:, 0] % 2},
                   SMART()),
        "decoder": (Language(), decoder("tiny", **SMALL), ahead, FGM(0.3)),
        "seq2seq": (Language(), seq2seq("seq2seq-tiny", **SMALL),
                    ahead | {"source": tokens(seed=2)}, FGM(0.3)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["token", "number", "masked", "decoder", "seq2seq"])
def test_every_task_has_an_adversary(kind: str) -> None:
    task, model, batch, method = others()[kind]
    objective: Any = Adversarial(task, method, SPECIAL).objective(model)
    params = model.init(jax.random.key(0))
    own = task.objective(model)
    terms = own.terms or (lambda *args: Terms({"": own(*args)[0]}, None))

    @jax.jit
    def both(params: Any, batch: Any) -> Any:
        return objective.terms(params, batch, key=jax.random.key(1)), terms(params, batch)

    found, (alone, *_) = both(params, batch)
    clean = {name: float(x) for name, x in found.losses.items() if name.startswith("clean")}
    wanted = {f"clean/{n}" if n else "clean": float(x) for n, x in alone.items()}
    assert clean == pytest.approx(wanted, rel=1e-5)
    assert set(objective.count(batch)) == set(found.losses)
    if isinstance(method, FGM):
        assert float(found.losses["adversarial"]) > 1.0005 * clean["clean"]
        assert float(found.metrics["adversarial/norm"]) == pytest.approx(0.3, rel=1e-5)
    else:
        near = {name for name in found.losses if name.startswith("proximal")}
        assert near and all((float(x) > 1e-10) != (n in near) for n, x in found.losses.items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Adversarial(TASK, "fgsm", ()), "unknown method 'fgsm'; give one of FGM PGD"),  # type: ignore[arg-type]
        (lambda: Adversarial("sst2", FGM(), ()), "the task is 'sst2'; give TextClassification"),  # type: ignore[arg-type]
        (lambda: Adversarial(TASK, FGM(), (-1,)), "is no tuple of token ids; give those of"),
        (lambda: Adversarial(Language(), VAT(), ()), "VAT compares an encoder's predictions"),
        (
            lambda: Adversarial(TASK, FGM(), ()).objective(resnet("tiny")),  # type: ignore[arg-type]
            "the model is 'ResNet', and TextClassification perturbs the token embeddings of an",
        ),
        (
            lambda: Adversarial(Language(), FGM(), ()).objective(classifier()),
            "'Encoder', and Language perturbs the token embeddings of a language model",
        ),
        (
            lambda: Adversarial(TASK, RDrop(), ()).objective(classifier()),
            "RDrop compares two passes, which are alike in a model with dropout=0",
        ),
        (
            lambda: Adversarial(TASK, VAT(), ()).objective(mean_encoder())(
                mean_encoder().init(jax.random.key(0)), batch_of()
            ),
            "the method draws its first offset; pass key=",
        ),
    ],
)
def test_mistakes_are_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
