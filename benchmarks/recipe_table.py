"""The page `docs/recipes.md`: what each recipe does to each tensor, and how it runs.

Run:  python -m benchmarks.recipe_table > docs/recipes.md
"""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp

from mpjax.markdown import table
from mpjax.ops.products.quantized_operand import how_it_runs
from mpjax.precision import (
    Moments,
    Operand,
    Precision,
    Recipe,
    dtype_name,
    get_precision,
    get_recipe,
    preset_names,
    recipe_names,
)

PLATFORMS = ("cpu", "cuda", "tpu")
_GENERIC = ("fixed-q8.8", "emulate(e3m4)")  # one of each family whose names carry a format
_SHORT = {
    "native float8 product": "float8 unit",
    "native int8 product": "int8 unit",
    "emulated: bfloat16 product of exact values": "bfloat16",
    "emulated: float32 product of exact values": "float32",
    "not quantised: compute dtype": "compute dtype",
}

_HEAD = """# Recipes

Written by `python -m benchmarks.recipe_table > docs/recipes.md`; do not edit.

A recipe says how one matrix product `y = x W` and its two backward products are quantised:
`fprop` is `y = Q(x) Q(W)`, `dgrad` is `dx = Q(dy) Q(W^T)`, `wgrad` is `dW = Q(x^T) Q(dy)`. Each
operand is quantised from high precision along the axis that its product sums over, so x and dy are
quantised twice, not transposed. An operand reads *format scaling, rounding, scale*: rounding is to
nearest even and scales are float32 unless it says otherwise; `scale 2^n up` is a power of two
rounded up, so that nothing overflows; `mx` has e8m0 scales, `nv` e4m3 scales and one of float32.

Every recipe is a preset of its name (`get_precision("fp8")`, `--precision fp8`): blocks quantised,
head, norms, attention and loss as in `bf16`. A rule gives it to some paths: `**/mlp/*=r=fp8`."""

_RUNS = """\
The last three columns say what multiplies the quantised values on a CPU, an NVIDIA GPU and a TPU: a
*unit* of the hardware, or an emulation in `float32` or `bfloat16`, whose operands hold the same
numbers. They differ by the order of their sums alone. Ask for any recipe with
`mpjax.ops.how_it_runs(recipe, platform)`."""

_PRESETS = """## Presets that change weights and optimizer states

A recipe leaves the stored weights and the optimizer in float32. These presets do not; the fields
combine freely with any recipe: `get_precision("fp8", moments="int8@256")`. Sources: Zamirai et al.
2020, Revisiting BFloat16 Training (stochastic rounding, Kahan summation); Dettmers et al. 2022,
8-bit Optimizers via Block-wise Quantization; NVIDIA Apex (O2, O3)."""

_OWN = """### How moments are rounded

Low moments are rounded up or down at random, so that their mean is kept. Rounded to nearest, a
second moment with `b2=0.999` cannot fall: a step takes a thousandth of it, which is less than half
the distance of two numbers in bf16, int8 and fp8, so that one large gradient makes steps small for
good ([evidence](evidence/moment_decay.md)). The random bits depend on the step and on the moment's
path; a skipped step draws none. `moments="int8@256,rounding=nearest"` rounds as bitsandbytes does.
A second moment above zero is never stored as zero. Of `rmsprop(centered=True)` the variance is
stored in place of `nu`, so that it cannot become negative.

A run goes on in other moments by `--resume latest --recast`
(`mpjax.train.checkpoint.restore.restore_into`): moments are converted and counts kept. Where the
checkpoint lacks a moment, all moments of that part begin anew together with their count; schedules
keep theirs.

## Your own recipe

Any format (`e3m4`, `q4.4`, `int4`), any scaling (`none`, `tensor`, `row`, `block(RxC)`, `mx(N)`,
`nv(N)`), one operand at a time; `None` leaves an operand in the compute dtype.

```python
import mpjax
from mpjax.precision import Operand, Recipe, register_recipe

values = Operand("e3m4", "block(1x64)")
gradients = Operand("e5m2", "row", rounding="stochastic")
mine = Recipe("mine", fprop=(values, values), dgrad=(gradients, values), wgrad=(values, None))
register_recipe(mine)

precision = mpjax.get_precision("bf16", rules=["**/mlp/*=r=mine"])  # the rest stays bf16
model = mpjax.models.decoder("tiny", precision)
```
`--import FILE.py` makes it known to a [script](guides/scripts.md).
`hadamard=16` transforms both operands of wgrad, `history=1024` takes scales from past steps,
`accumulate="e6m9", chunk=128` rounds the running sum. What a recipe loses in its three products, by
dot length and with outlier channels: `python experiments/formats.py --recipe NAME`."""


def _operand(operand: Operand | None) -> str:
    return "compute dtype" if operand is None else str(operand)


def product_rows(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """Yields a row for each product: recipe, product, both operands, how it runs where."""
    runs = [how_it_runs(recipe, platform) for platform in PLATFORMS]
    pairs = {"fprop": recipe.fprop, "dgrad": recipe.dgrad, "wgrad": recipe.wgrad}
    for number, ((product, left, right), (a, b)) in enumerate(
        zip((("fprop", "x", "W"), ("dgrad", "dy", "W"), ("wgrad", "x", "dy")), pairs.values(),
            strict=True)
    ):  # fmt: skip
        name = "" if number else f"`{recipe.name}`"
        cells = (f"{left}: {_operand(a)}", f"{right}: {_operand(b)}")
        yield (name, product, *cells, *(_SHORT.get(run[product], run[product]) for run in runs))


def about(recipe: Recipe) -> tuple[str, ...]:
    """Returns a row: recipe, what it accumulates in, what else it does, its source."""
    sums = "float32"
    if recipe.accumulate != "float32":
        sums = f"{recipe.accumulate} every {recipe.chunk} summands"
    elif "native int8 product" in how_it_runs(recipe, "cpu").values():
        sums = "int32"
    extra = []
    if recipe.hadamard:
        extra.append(f"random Hadamard transform of {recipe.hadamard} on both operands of wgrad")
    if recipe.history:
        extra.append(
            f"scales from the amax of the last {recipe.history} steps, margin {recipe.margin}:"
            " state in the model"
        )
    if recipe.uses_key:
        extra.append("needs a key")
    return f"`{recipe.name}`", sums, "; ".join(extra) or "–", recipe.source or "–"


def _stored(precision: Precision) -> bool:
    """Whether a preset changes what is stored: weights or moments."""
    return precision.update != "none" or precision.moments != Moments()


def preset_row(precision: Precision) -> tuple[str, ...]:
    """Returns a row: preset, dtype of its weights, update rule, moments, dtype of its products."""
    policy = precision.rules[-1].policy
    return (
        f"`{precision.name}`",
        dtype_name(policy.param_dtype),
        "float32" if policy.param_dtype == jnp.float32 else precision.update,
        str(precision.moments),
        dtype_name(policy.compute_dtype),
        str(precision.loss_scale),
    )


def recipe_page() -> str:
    """Returns the whole page in Markdown, of what is registered now."""
    recipes = [get_recipe(name) for name in (*recipe_names(), *_GENERIC)]
    first = table(
        ("recipe", "product", "left", "right", *PLATFORMS),
        [row for recipe in recipes for row in product_rows(recipe)],
    )
    second = table(("recipe", "sums in", "besides", "source"), [about(r) for r in recipes])
    presets = [get_precision(name) for name in preset_names()]
    third = table(
        ("preset", "weights", "update", "moments", "products", "loss scale"),
        [preset_row(p) for p in presets if _stored(p)],
    )
    return "\n\n".join([_HEAD, first, _RUNS, second, _PRESETS, third, _OWN]) + "\n"


if __name__ == "__main__":
    print(recipe_page(), end="")
