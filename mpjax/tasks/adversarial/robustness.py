"""What accuracy a classifier of texts keeps under attack: on its embeddings, and on the texts.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpjax.data.buckets import IGNORE, eval_batches
from mpjax.data.labelled import LabelledTexts
from mpjax.data.tokenizers.wordpiece import Example, WordPiece
from mpjax.errors import ConfigError, brief, is_whole
from mpjax.models import Encoder
from mpjax.precision import parse_policy
from mpjax.tasks.adversarial.adversarial import room
from mpjax.tasks.adversarial.edits import EDITS
from mpjax.tasks.adversarial.methods import PGD
from mpjax.tasks.adversarial.perturbation import slope
from mpjax.tasks.classify import TextClassification
from mpjax.tasks.labels import encoder_inputs, label_loss
from mpjax.typing import Array, Batch, ModelState, Params

STRONG = PGD(epsilon=1.0, step=0.25, steps=10)
Attacked = Callable[..., tuple[np.ndarray, int]]


def attacker(
    task: TextClassification, model: Encoder, attack: PGD, special: tuple[int, ...],
    *, batch: int, lengths: Sequence[int], padding: int = 0,
) -> Attacked:  # fmt: skip
    """Returns a function (params, examples) -> which are right after an attack on embeddings.

    Each example's embeddings are moved against its label, as `PGD` does; the weights have no
    dropout. The function is compiled once for each length that occurs.

    Args:
      task: whose labels.
      model: in float32 if gradients are to be exact: there is no loss scale here.
      attack: radius, step and steps.
      special: ids of tokens that are not moved.
      batch: examples at a time.
      lengths: what they are padded to.
      padding: id that fills them up.

    Returns:
      A function to (N,) bool, and the number of examples whose gradient was not finite.
    """
    policy = parse_policy("f32")

    @jax.jit
    def attacked(params: Params, batch: Batch, state: ModelState) -> tuple[Array, Array]:
        inputs, labels = encoder_inputs(batch), batch["labels"]
        room_BT = room(inputs["ids"], inputs.get("keep"), special)

        def logits(offset: Array) -> Array:
            return model.apply(params, inputs | {"offset": offset}, state=state)[0][task.output]

        def climb(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            offset, finite_B = carry
            found = slope(lambda x: label_loss(logits(x), labels, policy), offset, room_BT)
            return attack.moved(offset, found.gradient_BTD), finite_B & found.finite_B

        first = jnp.zeros((*room_BT.shape, model.config.width), jnp.float32)
        begin = (first, jnp.ones(first.shape[0], bool))
        offset, finite_B = jax.lax.fori_loop(0, attack.steps, climb, begin)
        return jnp.argmax(logits(offset), -1) == labels, finite_B

    def run(
        params: Params, examples: Sequence[Example], state: ModelState = None
    ) -> tuple[np.ndarray, int]:
        right, lost = np.zeros(len(examples), bool), 0
        for rows, one in eval_batches(
            examples, batch=batch, lengths=lengths, padding={"ids": padding}
        ):
            found, finite = jax.device_get(attacked(params, one, state))
            right[rows] = found[: len(rows)]
            lost += int(np.sum(~finite[: len(rows)]))
        return right, lost

    return run


def evaluate_robust(
    task: TextClassification, model: Encoder, params: Params, texts: LabelledTexts,
    pieces: WordPiece, *, attack: PGD = STRONG, edits: int = 1, copies: int = 3,
    batch: int = 32, lengths: Sequence[int] = (64,), seed: int = 0, state: ModelState = None,
) -> dict[str, float]:  # fmt: skip
    """Returns the accuracy of a classifier, clean and under three attacks, in 0 ... 1.

    An example counts under an attack if it is right without and with it; under edits, if all its
    edited copies are right too. Special tokens and padding are not attacked, nor is the second text
    of a pair edited.

    Args:
      task: of the classes.
      model: best in float32, whatever the Precision that it was trained in.
      params: its weights.
      texts: held-out ones.
      pieces: the tokenizer.
      attack: on the embeddings.
      edits: changes of a text.
      copies: edited copies of a text, drawn by the seed.
      batch: examples at a time.
      lengths: what they are padded to; longer ones are cut.
      seed: of the edits.
      state: of the model, as of delayed scaling.

    Returns:
      `accuracy`, `pgd accuracy`, `character accuracy`, `word accuracy`, and `pgd nonfinite`, the
      number of examples whose gradient was not finite, so that they were not attacked.

    Raises:
      ConfigError: another task, an attack that is no `PGD`, numbers below 1, a text without a
        label.

    References:
      Madry et al. 2018, Towards Deep Learning Models Resistant to Adversarial Attacks; Pruthi et
      al. 2019, Combating Adversarial Misspellings with Robust Word Recognition.
    """
    if not isinstance(task, TextClassification):
        raise ConfigError(f"robust: the task is {brief(task)}; give TextClassification")
    if not isinstance(attack, PGD):
        raise ConfigError(f"robust: the attack is {brief(attack)}; give PGD(epsilon=...)")
    for name, value in (("edits", edits), ("copies", copies)):
        if not is_whole(value, 1):
            raise ConfigError(f"robust: {name}={brief(value)} is no number of 1 or above")
    if IGNORE in texts.labels:
        raise ConfigError("robust: a text has no label; leave it out")
    longest = max(lengths)
    predict = task.predictor(model, batch=batch, lengths=lengths, padding=pieces.pad)

    def encoded(texts: LabelledTexts) -> list[Example]:
        return task.examples(pieces, texts, longest=longest)

    def right(examples: list[Example]) -> np.ndarray:
        return task.correct(predict(params, examples, state), examples)

    examples = encoded(texts)
    clean = right(examples)
    attacked, lost = attacker(
        task, model, attack, pieces.special, batch=batch, lengths=lengths, padding=pieces.pad
    )(params, examples, state)
    scores = {"accuracy": clean, "pgd accuracy": clean & attacked}
    for kind, (name, edit) in enumerate(EDITS.items()):
        held = clean
        for copy in range(copies):
            draws = (np.random.default_rng((seed, kind, copy, i)) for i in range(len(texts)))
            changed = tuple(
                edit(t, edits, draw) for t, draw in zip(texts.texts, draws, strict=True)
            )
            held = held & right(encoded(dataclasses.replace(texts, texts=changed)))
        scores[f"{name} accuracy"] = held
    return {name: float(np.mean(x)) for name, x in scores.items()} | {"pgd nonfinite": float(lost)}
