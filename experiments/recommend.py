"""Does a low precision cost a recommender its ranking? Films from the texts of those liked before.

One small encoder reads what a user liked last (titles, years and genres, as one text) and each film
alone; the scaled cosine of the two is the score. It is trained in several precisions to tell the
film that came next from drawn ones, and judged on each user's last film among all others, against
popularity and matrix factorisation.

Run:       python experiments/recommend.py
           python experiments/recommend.py --kind bpr
           python experiments/recommend.py --data FILE.tsv
Expected:  NDCG@10 of 4.2 % in fp32 against 2.6 % of popularity and 3.9 % of matrix factorisation,
           bf16 and fp16 within the noise of three seeds (docs/evidence/recommend.md). A run of one
           seed takes a minute of one core.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from common import (
    finetune,  # sets XLA flags before JAX starts
    finetune_report,
    launch,
)
from common.datasets.sources import INTERACTIONS
from mpjax.data import (
    Interactions,
    candidates,
    histories,
    leave_one_out,
    load_interactions,
)
from mpjax.errors import ConfigError, need
from mpjax.report import interval, length_slices
from mpjax.tasks import Ranking, ranking_gains, ranking_scores, target_ranks
from mpjax.typing import Params

AT = 10


@dataclasses.dataclass(frozen=True)
class Config(finetune.Tuning):
    """Train a recommender by text in several precisions."""

    checkpoint: str = "none"
    """An asset, a folder or a name on the Hugging Face Hub; `none` trains a small one anew."""
    precision: tuple[str, ...] = ("fp32", "bf16", "fp16")
    """Precisions, or schedules such as late:fp8:bf16:0.2; others are compared with the first."""
    layers: int = 1
    """Blocks, without a checkpoint."""
    dropout: float = 0.0
    """Rate in training."""
    data: str = "movielens"
    """`movielens`, or a file of user<TAB>text of the item<TAB>time lines, .csv or .jsonl."""
    kind: Literal["softmax", "bpr"] = "softmax"
    """Loss: softmax over the candidates of all rows, or pairs with a row's own negatives."""
    history: int = 5
    """Items of a history at most, the latest."""
    negatives: int = 1
    """Items drawn for each row, besides its own."""
    temperature: float = 0.1
    """That scores are divided by."""
    item_length: int = 16
    """Tokens that items are padded to; longer ones are cut."""
    vocabulary: int = 8000
    """Ids of the tokenizer, which is then trained on the items' texts."""
    lengths: tuple[int, ...] = (48,)
    """Tokens that histories are padded to; a step is compiled for each. Longer ones are cut."""
    batch: int = 128
    """Histories a step."""
    steps: int = 300
    """Steps a run."""
    lr: float = 5e-3
    """Peak learning rate."""
    WARMUP: ClassVar[int] = 50
    warmup: launch.Warmup = None
    """Steps of linear warm-up; by default 50, or half of the steps if these are fewer."""
    out: Path = Path("runs/recommend")
    """Folder of the report and of all runs."""


def factorised(
    train: Interactions, past: Interactions, test: Interactions, components: int
) -> np.ndarray:
    """Scores of a truncated singular value decomposition of who liked what, (tests, items)."""
    svd = need("sklearn.decomposition", "tasks", "baselines").TruncatedSVD(
        components, random_state=0
    )
    users = 1 + int(past.users.max())
    svd.fit(train.matrix(users).astype(np.float32))
    rows = past.matrix(users)[test.users].astype(np.float32)
    return svd.transform(rows) @ svd.components_


def baselines(
    train: Interactions, validation: Interactions, past: Interactions, test: Interactions
) -> dict[str, np.ndarray]:
    """Scores of popularity and of matrix factorisation, whose size the validation chooses."""
    known = train.matrix(1 + int(past.users.max()))[validation.users]
    most = min(len(train.texts), 1 + int(train.users.max())) - 1
    gains = {
        size: ranking_scores(
            factorised(train, train, validation, size), validation.items, known=known
        )["mrr"]
        for size in (4, 8, 16, 32, 64)
        if size <= most
    }
    best = max(gains, key=lambda size: gains[size], default=1)
    popularity = np.broadcast_to(train.counts(), (len(test), len(train.texts)))
    return {
        "popularity": popularity.astype(np.float64),
        f"truncated SVD, {best} components": factorised(train, past, test, best),
    }


def as_texts(found: Sequence[np.ndarray], data: Interactions) -> list[str]:
    """Histories as texts, the latest item first, so that what is cut is the oldest."""
    return [" ; ".join(data.texts[i] for i in items[::-1]) for items in found]


def joined(*sides: Interactions) -> Interactions:
    """Several sides of a split as one, ordered by user and time."""
    users, items, times = (
        np.concatenate([getattr(side, name) for side in sides])
        for name in ("users", "items", "times")
    )
    order = np.lexsort((items, times, users))
    return Interactions(users[order], items[order], times[order], sides[0].texts)


def main(config: Config) -> None:
    """Runs the comparison and writes its report."""
    finetune.check(config)
    launch.positive(config, "history", "negatives", "temperature", "item_length")
    if config.item_length < 4:
        raise ConfigError(
            f"item_length: {config.item_length} has no room for text; give at least 4 tokens"
        )
    begun = time.perf_counter()
    task = Ranking(config.kind, config.temperature)
    data = load_interactions(config.data, sources=INTERACTIONS)
    train, validation, test = leave_one_out(data)
    past = joined(train, validation)
    need("sklearn.decomposition", "tasks", "baselines")
    start = finetune.Start(config, "none", 2, data.texts, pool="mean")
    pieces, longest = start.pieces(), max(config.lengths)
    sides = [(histories(train, train, config.history), train)]
    sides += [(histories(past, test, config.history), test)]
    examples, held_out = (
        task.examples(pieces, as_texts(found, data), side.items, longest=longest)
        for found, side in sides
    )
    # What a user liked first of all has no history to be told from.
    examples = [e for e, items in zip(examples, sides[0][0], strict=True) if len(items)]
    items = task.items(pieces, data.texts, longest=config.item_length)
    change = candidates(items, train.counts(), config.negatives, length=config.item_length)
    model = finetune.check_arms(config, task, start, pieces.vocab_size)
    launch.writable(config.out)
    known = past.matrix(1 + int(data.users.max()))[test.users]
    counted, gains = {}, {}
    for name, scores in baselines(train, validation, past, test).items():
        counted[name] = ranking_scores(scores, test.items, known=known)
        gains[name] = ranking_gains(target_ranks(scores, test.items, known=known))
    texts = task.predictor(model, batch=config.batch, lengths=config.lengths)
    alone = task.predictor(model, batch=config.batch, lengths=(config.item_length,))

    def judge(params: Params) -> tuple[dict[str, float], np.ndarray]:
        scores = task.scores(texts(params, held_out), alone(params, items))
        ranks = target_ranks(scores, test.items, known=known)
        return task.evaluate(scores, test.items, known=known), ranking_gains(ranks)

    arms = [
        finetune.run_arm(
            label, config, task, start, examples, pieces.vocab_size, judge, config.out,
            change=change,
        )
        for label in config.precision
    ]  # fmt: skip
    slices = {
        "likes of the item in training": length_slices(
            train.counts()[test.items].tolist(), unit="likes"
        ),
        "likes of the user": length_slices(known.sum(1).tolist(), unit="likes"),
    }
    title = f"{config.data}: the next item by precision"
    found = finetune_report.tables(
        title, counted, arms, (f"hr@{AT}", "mrr"), slices, measured=(f"ndcg@{AT}",)
    )
    notes = []
    for name, own in gains.items():
        mean, half = interval(100 * (arms[0].correct.mean(0) - own))
        notes.append(
            f"{arms[0].label} is {mean:+.2f} ± {half:.2f} points of NDCG@{AT} above {name} (95 %"
            f" interval over {len(test)} users)."
        )
    notes += [
        f"Each of {len(test)} users' last item is ranked among all {len(data.texts)} that the user"
        " had not liked before; equal scores count against it. All numbers are in %.",
        f"{len(examples)} training histories of at most {config.history} items,"
        f" {config.steps} steps of {config.batch}, loss {config.kind}, vocabulary"
        f" {pieces.vocab_size}; judged in {config.eval_precision}, the loss over all items.",
        f"Slices are of NDCG@{AT}. Took {time.perf_counter() - begun:.0f} s on {launch.machine()}.",
    ]
    finetune_report.write(config.out, found, counted, arms, notes, "nats/item")


if __name__ == "__main__":
    launch.command(main, Config)
