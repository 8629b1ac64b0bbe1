"""Autocast on models that know nothing of it: one in Equinox, one in Flax NNX, as they are.

Each model is written with its library alone and computes in float32. `autocast` runs its products
in 16 bits, `named` gives its modules paths for rules, `audit` says what share ran low. The models
are small causal transformers: RMSNorm, rotary positions and a tied head in Equinox; LayerNorm,
learned positions and a gated MLP in NNX.

Run:       python experiments/autocast_any.py
           python experiments/autocast_any.py --rule "**/attention=fp32" --precision bf16
Expected:  100 % of the product FLOPs low and the loss within 0.5 % of float32's in bf16 and, with
           a dynamic loss scale, in fp16. Steps/s on CPU say nothing of speed elsewhere.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from common import launch  # sets XLA flags before JAX starts

import jax  # isort: skip
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from common.datasets.sources import DOCUMENTS
from mpjax.data import Corpus, batches, load_corpus, validation_batches
from mpjax.errors import ConfigError
from mpjax.interpret import audit, autocast, named
from mpjax.optim import (
    DynamicLossScale,
    LossScale,
    NoOpLossScale,
    apply_updates,
    make_optimizer,
    scaled_value_and_grad,
    select,
)
from mpjax.precision import dtype_name, parse_dtype
from mpjax.report import gaps, interval
from mpjax.typing import Array, Batch, Key, Params, PyTree

Apply = Callable[[Params, Array], Array]  # weights, ids of shape (batch, seq) -> logits
Make = Callable[[int], tuple[Params, Apply]]  # seed -> weights and function
EXACT = "fp32"


@dataclasses.dataclass(frozen=True)
class Work:
    """What is trained, whatever the model."""

    data: str = "stdlib"
    """`stdlib`, `janeausten`, a text file, a folder, FILE.jsonl:COLUMN, FILE.parquet:COLUMN or
    hf:NAME."""
    layers: int = 2
    """Blocks."""
    width: int = 64
    """Width of the residual stream."""
    heads: int = 4
    """Attention heads."""
    batch: int = 8
    """Sequences a step."""
    seq: int = 64
    """Tokens a sequence."""
    steps: int = 200
    """Steps a run."""
    lr: float = 3e-3
    """Peak learning rate of AdamW; it rises for a tenth of the steps, then falls linearly."""
    eval_batches: int = 32
    """Batches of held-out text that judge a run, in float32."""


@dataclasses.dataclass(frozen=True)
class Config(Work):
    """Train unmodified models of other libraries under autocast."""

    model: tuple[str, ...] = ("equinox", "nnx")
    """Among `equinox` and `nnx`."""
    precision: tuple[str, ...] = ("bf16", "fp16")
    """Dtypes of autocast; float32 is always trained, to compare with."""
    rule: tuple[str, ...] = ()
    """`PATTERN=VALUE` by module path, such as `**/attention=fp32`."""
    seeds: int = 1
    """Trainings each; the n-th seed has the same initial weights and batches in every precision."""


def equinox_model(work: Work, words: int) -> Make:
    """A transformer in Equinox, which takes one sequence."""
    import equinox as eqx

    class Block(eqx.Module):
        norm1: Any
        attention: Any
        rotary: Any
        norm2: Any
        mlp: Any

        def __init__(self, key: Key):
            attention, mlp = jax.random.split(key)
            self.norm1 = eqx.nn.RMSNorm(work.width)
            self.attention = eqx.nn.MultiheadAttention(work.heads, work.width, key=attention)
            self.rotary = eqx.nn.RotaryPositionalEmbedding(work.width // work.heads)
            self.norm2 = eqx.nn.RMSNorm(work.width)
            self.mlp = eqx.nn.MLP(work.width, work.width, 4 * work.width, 1, jax.nn.gelu, key=mlp)

        def rotate(self, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
            turn = jax.vmap(self.rotary, in_axes=1, out_axes=1)
            return turn(q), turn(k), v

        def __call__(self, x: Array, mask: Array) -> Array:
            y = jax.vmap(self.norm1)(x)
            x = x + self.attention(y, y, y, mask, process_heads=self.rotate)
            return x + jax.vmap(self.mlp)(jax.vmap(self.norm2)(x))

    class LanguageModel(eqx.Module):
        embed: Any
        blocks: list[Any]
        norm: Any

        def __init__(self, key: Key):
            embed, *keys = jax.random.split(key, work.layers + 1)
            table = jax.random.normal(embed, (words, work.width)) * 0.02
            self.embed = eqx.nn.Embedding(weight=table)
            self.blocks = [Block(k) for k in keys]
            self.norm = eqx.nn.RMSNorm(work.width)

        def __call__(self, ids: Array) -> Array:
            x = jax.vmap(self.embed)(ids)
            mask = jnp.tril(jnp.ones((len(ids), len(ids)), bool))
            for block in self.blocks:
                x = block(x, mask)
            return jax.vmap(self.norm)(x) @ self.embed.weight.T

    def make(seed: int) -> tuple[Params, Apply]:
        model = named(LanguageModel(jax.random.key(seed)))
        weights, rest = eqx.partition(model, eqx.is_array)
        return weights, lambda weights, ids: jax.vmap(eqx.combine(weights, rest))(ids)

    return make


def nnx_model(work: Work, words: int) -> Make:
    """A transformer in Flax NNX."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            width, hidden = work.width, 2 * work.width
            self.norm1 = nnx.LayerNorm(width, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(work.heads, width, decode=False, rngs=rngs)
            self.norm2 = nnx.LayerNorm(width, rngs=rngs)
            self.gate = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
            self.up = nnx.Linear(width, hidden, use_bias=False, rngs=rngs)
            self.down = nnx.Linear(hidden, width, use_bias=False, rngs=rngs)

        def __call__(self, x: Array, mask: Array) -> Array:
            x = x + self.attention(self.norm1(x), mask=mask)
            y = self.norm2(x)
            return x + self.down(nnx.silu(self.gate(y)) * self.up(y))

    class LanguageModel(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.embed = nnx.Embed(words, work.width, rngs=rngs)
            self.position = nnx.Embed(work.seq, work.width, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(work.layers)])
            self.norm = nnx.LayerNorm(work.width, rngs=rngs)
            self.head = nnx.Linear(work.width, words, rngs=rngs)

        def __call__(self, ids: Array) -> Array:
            x = self.embed(ids) + self.position(jnp.arange(ids.shape[1])[None])
            for block in self.blocks:
                x = block(x, nnx.make_causal_mask(ids))
            return self.head(self.norm(x))

    def make(seed: int) -> tuple[Params, Apply]:
        graph, weights = nnx.split(named(LanguageModel(nnx.Rngs(seed))))
        return weights, lambda weights, ids: nnx.merge(graph, weights)(ids)

    return make


MODELS = {"equinox": equinox_model, "nnx": nnx_model}


@dataclasses.dataclass(frozen=True)
class Run:
    """One model in one precision, trained from each seed.

    Args:
      loss: on held-out text in nats a token, of the weights in float32; one a seed.
      own: the same as autocast computes it.
      share: of the product FLOPs of a step in 16 bits, by `audit`.
      steps_per_s: by the median step.
      skipped: steps whose gradients were not finite, one a seed.
    """

    loss: tuple[float, ...]
    own: tuple[float, ...]
    share: float
    steps_per_s: float
    skipped: tuple[int, ...]


def loss_of(apply: Apply) -> Callable[[Params, Batch], Array]:
    """The mean cross-entropy in nats a token."""

    def loss(weights: Params, batch: Batch) -> Array:
        logits = apply(weights, batch["inputs"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()

    return loss


def train(
    starts: Sequence[Params], apply: Apply, precision: str, rules: Sequence[str], work: Work,
    corpus: Corpus,
) -> Run:  # fmt: skip
    """Trains a model under autocast, or as it is in `fp32`; weights and optimizer stay float32.

    Args:
      starts: weights to begin with; the n-th are trained on the n-th order of batches.
      apply: the model's function.
      precision: `fp32`, or the dtype of autocast; in float16 the loss scale is dynamic.
      rules: of autocast.
      work: what is trained.
      corpus: its text.
    """
    exact = loss_of(apply)
    loss_fn = exact if precision == EXACT else autocast(exact, precision, rules=rules)
    value_and_grad: Callable[..., tuple[Array, Params, Array]] = scaled_value_and_grad(loss_fn)
    warmup = work.steps // 10
    tx = make_optimizer("adamw", work.lr, schedule="linear", steps=work.steps, warmup=warmup)

    @jax.jit
    def step(scale: LossScale, weights: Params, state: optax.OptState, batch: Batch) -> PyTree:
        _, grads, finite = value_and_grad(scale, weights, batch)
        with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction needs it
            updates, new = tx.update(grads, state, weights)
        kept = select(finite, (apply_updates(weights, updates), new), (weights, state))
        return scale.adjust(finite), *kept, ~finite

    held_out = list(validation_batches(
        corpus.validation, batch=work.batch, seq=work.seq, limit=work.eval_batches
    ))  # fmt: skip
    judges = [jax.jit(exact), jax.jit(loss_fn)]
    half = precision != EXACT and dtype_name(parse_dtype(precision)) == "float16"
    times: list[float] = []
    losses: list[list[float]] = []
    skipped: list[int] = []
    for seed, weights in enumerate(starts):
        scale: LossScale = DynamicLossScale() if half else NoOpLossScale()
        state, bad = tx.init(weights), 0
        data = batches(corpus.train, batch=work.batch, seq=work.seq, seed=seed)
        for _, batch in zip(range(work.steps), data, strict=False):
            start = time.perf_counter()
            scale, weights, state, left = jax.block_until_ready(step(scale, weights, state, batch))
            times.append(time.perf_counter() - start)
            bad += int(left)
        losses.append([float(np.mean([fn(weights, b) for b in held_out])) for fn in judges])
        skipped.append(bad)
    report = audit(jax.value_and_grad(loss_fn), starts[0], held_out[0])
    share = report.share("bfloat16") + report.share("float16")
    loss, own = zip(*losses, strict=True)
    return Run(loss, own, share, float(1 / np.median(times[1:] or times)), tuple(skipped))


def maker(name: str, work: Work, words: int) -> Make:
    """What makes a model by name.

    Raises:
      ConfigError: its library is not installed.
    """
    try:
        return MODELS[name](work, words)
    except ImportError as error:
        others = " ".join(other for other in MODELS if other != name)
        raise ConfigError(
            f"model: {name} needs a package that is not installed ({error}); pip install"
            f" {error.name or name}, or run --model {others}"
        ) from None


def cells(name: str, precision: str, run: Run, exact: Run) -> tuple[str, ...]:
    """A row of the table."""
    gap, own = "–", "–"
    if run is not exact:
        mean, half = interval(gaps(run.loss, exact.loss))
        gap = f"{mean:+.2f} %" if np.isnan(half) else f"{mean:+.2f} ± {half:.2f} %"
        own = f"{np.mean(run.own):.4f}"
    return (
        name, precision, f"{np.mean(run.loss):.4f}", gap, own, f"{run.share:.1%}",
        f"{run.steps_per_s:.1f}", " ".join(map(str, run.skipped)),
    )  # fmt: skip


def main(config: Config) -> None:
    """Trains each model in each precision and prints the table."""
    launch.positive(config, "layers", "width", "heads", "batch", "seq", "steps", "lr")
    launch.positive(config, "eval_batches", "seeds")
    launch.not_empty(config, "model")
    for name in config.model:
        if name not in MODELS:
            raise ConfigError(f"model: unknown {name!r}; known: {' '.join(MODELS)}")
    start = time.perf_counter()
    corpus = load_corpus(config.data, sources=DOCUMENTS)
    table = Table("model", "precision", "validation loss", "gap", "under autocast",
                  "product FLOPs low", "steps/s", "skipped", title="Autocast on any model",
                  title_justify="left")  # fmt: skip
    for name in config.model:
        make = maker(name, config, corpus.tokenizer.vocab_size)
        built = [make(seed) for seed in range(config.seeds)]
        starts, apply = [weights for weights, _ in built], built[0][1]
        exact = train(starts, apply, EXACT, (), config, corpus)
        table.add_row(*cells(name, EXACT, exact, exact))
        for precision in config.precision:
            run = train(starts, apply, precision, config.rule, config, corpus)
            table.add_row(*cells(name, precision, run, exact))
    launch.wide().print(table)
    took = f"took {time.perf_counter() - start:.0f} s on {launch.machine()}"
    print(f"{config.steps} steps of {config.batch} x {config.seq} tokens; {took}")


if __name__ == "__main__":
    launch.command(main, Config)
