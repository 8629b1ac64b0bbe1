"""The measurements in their order, most valuable first, and how long each is expected to take.

Nothing here imports JAX: the process that gives the cells out never touches the device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

PARTS = {"right": "a", "fast": "b", "peers": "c", "tools": "d"}


class Size(NamedTuple):
    """Sizes of what is measured.

    Args:
      model: fields of DecoderConfig.
      batch: sequences of a step.
      tokens: of a sequence.
      side: of the square matrices whose product is timed.
      patterns: float32 patterns that are rounded.
      draws: of stochastic rounding.
      new: tokens that are generated for each sequence.
      seconds: that are spent on the timed repetitions of one thing, at most.
      twin: layers, width, heads, words, batch and tokens of the model of part d.
    """

    model: dict[str, Any]
    batch: int
    tokens: int
    side: int
    patterns: int
    draws: int
    new: int
    seconds: float
    twin: tuple[int, int, int, int, int, int]


_LLAMA = dict(norm="rms", position="rotary", activation="swiglu", tied=False)
SIZES = {
    "full": Size(
        # TinyLlama's shape, 1.1e9 parameters: Zhang et al. 2024, arXiv 2401.02385, section 2.2
        dict(vocabulary=32000, layers=22, width=2048, heads=32, kv_heads=4, mlp_width=5632,
             context=2048, **_LLAMA),
        8, 2048, 8192, 10**6, 10**6, 128, 6.0, (6, 2048, 32, 32000, 4, 1024),
    ),
    "tiny": Size(
        dict(vocabulary=64, layers=1, width=32, heads=4, kv_heads=2, mlp_width=64, context=64,
             loop="scan", **_LLAMA),
        2, 32, 64, 2**12, 2**14, 4, 0.3, (1, 32, 4, 64, 2, 16),
    ),
}  # fmt: skip


class Cell(NamedTuple):
    """One short measurement.

    Args:
      part: right, fast, peers or tools.
      name: what it measures.
      call: MODULE:FUNCTION of this folder; called with the Size and the arguments.
      arguments: of the function, by name.
      full: seconds that it is expected to take at full size on an accelerator, compilation
        included. Judged from the work, before any run: see `Cell.limit`.
      tiny: the same at tiny size on two cores; 0 leaves it out there, where another one of its
        kind has run the same code.
      alone: whether it needs a process of its own, so that its peak memory is its own.
      torch: whether it needs torch.
    """

    part: str
    name: str
    call: str
    arguments: dict[str, Any] = {}
    full: float = 10.0
    tiny: float = 3.0
    alone: bool = False
    torch: bool = False

    def estimate(self, size: str) -> float:
        """Seconds that it is expected to take."""
        return self.full if size == "full" else self.tiny

    def limit(self, size: str) -> float:
        """Seconds after which it is stopped, so that one that hangs does not end the run."""
        return 3 * self.estimate(size) + 60


def _train(
    precision: str, seconds: float, remat: str = "none", moments: str = "", tiny: float = 8
) -> Cell:
    name = f"train {precision}" + (f", moments {moments}" if moments else "")
    name += "" if remat == "none" else f", remat {remat}"
    arguments = {"precision": precision, "remat": remat, "moments": moments}
    return Cell("fast", name, "fast:train", arguments, seconds, tiny, alone=True)


def _product(kind: str, seconds: float = 5) -> Cell:
    return Cell("fast", f"product {kind}", "fast:product", {"kind": kind}, seconds, 1.5)


def _skipped(precision: str, tiny: float) -> Cell:
    arguments = {"precision": precision}
    return Cell("right", f"a skipped step, {precision}", "right:skipped", arguments, 15, tiny)


RECIPES = (
    "fp8", "fp8-delayed", "fp8-row", "int8", "fp8-block", "fp8-row-hp", "int8-switchback", "mxfp8",
    "mxfp4", "nvfp4",
)  # fmt: skip
CELLS = (
    Cell("right", "rounding to every format", "right:rounding", {}, 15, 10),
    Cell("right", "quantize and dequantize", "right:quantized", {}, 15, 10),
    *(
        Cell("right", f"products of recipe {name}", "products:recipe", {"name": name}, 5, 4)
        for name in RECIPES
    ),
    Cell("right", "stochastic rounding", "right:stochastic", {}, 5, 2),
    Cell("right", "attention", "right:attention", {}, 10, 4),
    _skipped("fp8-delayed loss_scale=dynamic:init=1024", 10),
    _skipped("pure-bf16-sr", 0),
    Cell("right", "20 steps of fp32", "right:twenty", {}, 25, 12),
    _train("bf16", 40),
    _train("fp8", 50),
    Cell("peers", "torch, compiled and eager", "peers:against_torch", {}, 110, 60, alone=True,
         torch=True),
    Cell("peers", "hand-written JAX", "peers:against_careful", {}, 50, 12, alone=True),
    *map(_product, ("bf16", "e4m3", "recipe fp8")),
    _train("bf16", 40, "dots"),
    _train("fp8-delayed", 50, tiny=0),
    _train("pure-bf16-sr", 45, moments="int8@256"),
    _train("int8", 50, tiny=0),
    _train("fp8-row", 50, tiny=0),
    *map(_product, ("fp32", "tf32", "int8", "recipe fp8-row", "recipe fp8-delayed", "recipe int8")),
    Cell("peers", "torch alone", "peers:torch_alone", {}, 70, 30, alone=True, torch=True),
    Cell("tools", "autocast", "tools:autocast", {}, 30, 6),
    Cell("tools", "generate with bf16 weights", "tools:generation", {"storage": "bf16"}, 30, 6,
         alone=True),
    Cell("tools", "generate with int8 weights", "tools:generation", {"storage": "int8"}, 30, 6,
         alone=True),
    Cell("tools", "monitor every 50 steps", "tools:monitoring", {}, 40, 12),
    Cell("tools", "trace_nonfinite", "tools:planted", {}, 30, 12),
    _train("fp32", 60, "full", tiny=0),
    _train("fp8", 50, "dots", tiny=0),
    _train("fp8-delayed", 50, "dots", tiny=0),
    _train("int8", 50, "dots", tiny=0),
    _train("fp8-row", 50, "dots", tiny=0),
    _train("pure-bf16-sr", 45, "dots", "int8@256", tiny=0),
)  # fmt: skip
