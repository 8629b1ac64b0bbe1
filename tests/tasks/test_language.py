"""Language: prompts carry no loss, and perplexity weighs batches by their targets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mpjax.data.buckets import pad
from mpjax.data.chat.instructions import instruction_examples
from mpjax.errors import ConfigError
from mpjax.models import decoder
from mpjax.tasks import Language
from mpjax.train import build

pytestmark = pytest.mark.usefixtures("fast_compile")
PAIRS = [("2+2=", "4"), ("say hi to me: ", "hi"), ("a", "bcdef")]
EXAMPLES = instruction_examples(PAIRS, lambda text: list(text.encode()), end=0, longest=24)
MODEL = decoder("tiny", layers=1, width=16, heads=2)
PARAMS = MODEL.init(jax.random.key(0))
LOGITS = jax.jit(lambda ids: MODEL.apply(PARAMS, ids)[0])


def batch_of(examples):
    return jax.tree.map(jnp.asarray, pad(examples, 24))


def by_hand(examples):
    """Mean over answers of each pair alone, without padding, from logits in float64."""
    losses = []
    for example in examples:
        logits = np.asarray(LOGITS(example["inputs"][None])[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        each = -log_p[np.arange(len(logits)), example["targets"]]
        losses += each[example["weights"] == 1].tolist()
    return np.mean(losses)


def test_the_loss_is_on_answers_only_and_padding_changes_nothing():
    loss_fn = jax.jit(Language().objective(MODEL))
    loss, _ = loss_fn(PARAMS, batch_of(EXAMPLES))
    assert float(loss) == pytest.approx(by_hand(EXAMPLES), rel=1e-5)
    whole = [e | {"weights": np.ones_like(e["weights"])} for e in EXAMPLES]
    assert abs(float(loss_fn(PARAMS, batch_of(whole))[0]) - float(loss)) > 1e-3


def test_perplexity_weighs_batches_by_targets():
    judge = Language().judge(MODEL)
    batches = [batch_of(EXAMPLES[:2]), batch_of(EXAMPLES[2:])]
    scores = judge(PARAMS, batches)
    assert scores["loss"] == pytest.approx(by_hand(EXAMPLES), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(np.exp(by_hand(EXAMPLES)), rel=1e-4)
    plain = {"inputs": np.zeros((2, 4), np.int32), "targets": np.ones((2, 4), np.int32)}
    assert judge(PARAMS, [plain])["loss"] > 0
    with pytest.raises(ConfigError, match="no target to judge"):
        judge(PARAMS, [])


def test_it_trains():
    state, step = build(MODEL, optax.adam(0.01), objective=Language().objective)
    first = last = None
    for _ in range(12):
        state, metrics = step(state, batch_of(EXAMPLES))
        last = float(metrics["loss"])
        first = first or last
    assert last < 0.8 * first
