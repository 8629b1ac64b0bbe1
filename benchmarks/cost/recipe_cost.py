"""What emulation costs: training steps under every recipe against the bf16 step.

Run:       python -m benchmarks.cost.recipe_cost
Expected:  the fp8 step takes at most 1.6 times as long as the bf16 step.
"""

from __future__ import annotations

import sys

from bench_recipes import Config, measure

from benchmarks.common.page import write
from mpjax.markdown import table


def main() -> bool:
    """Measures all recipes; whether fp8 is within its bar."""
    config = Config()
    rows = measure(config)
    fp8 = float(next(row[2] for row in rows if row[0] == "fp8").split()[0])
    text = (
        "Training steps of a 12.3M-parameter GPT (6 layers, width 384, 8 x 256 tokens), each"
        f" taken in turn with the bf16 step, {config.rounds} rounds; the ratio is the centre of the"
        " paired ratios with its 95 % interval. On this CPU bf16 products run as float32 products"
        " with converts around them, so a recipe whose emulation multiplies float32 saves those."
        f" The bar for fp8 is 1.6: {fp8:.3f}, {'met' if fp8 <= 1.6 else 'MISSED'}."
    )
    head = ("precision", "median s", "time / bf16", "what multiplies")
    write("recipe_cost", "What emulating a recipe costs", f"{text}\n\n{table(head, rows)}")
    return fp8 <= 1.6


if __name__ == "__main__":
    sys.exit(not main())
