"""Will it fit, how fast can it be, and what does it send? A step compiled for chips not at hand.

The train step of a decoder is compiled by the real compiler of a TPU or GPU, with no such device
here, once for each precision. The table says what every device needs by part, its operations, bytes
and collectives, and the time that these take at the rates that makers publish: no step is faster.

Run:       python experiments/preflight.py --model llama-7b --precision bf16 fp8 int8
               --target v5e:16x16 --batch 4 --seq 2048
           python experiments/preflight.py --model gpt2 --target cpu:8 --mesh data=2,fsdp=4
Expected:  a page in --out and on the terminal, in one to four minutes a precision for 32 layers of
           Llama-2-7B: 319 MB of arguments on each of 256 chips. TPUs need the package libtpu, GPUs
           the extra cuda12.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"  # another process compiles, and none of them runs a step

from common import launch  # sets XLA flags before JAX starts
from common.command_line import imported_files
from mpjax.files import write_text
from mpjax.targets import page, preflight
from mpjax.typing import Settings


@dataclasses.dataclass(frozen=True)
class Config:
    """Compile a decoder's training step for chips that are not here."""

    model: str = "llama-7b"
    """Size of the decoder, such as `gpt2` or `llama-7b`."""
    precision: tuple[str, ...] = ("bf16",)
    """Presets or lines of text, each with a column of its own."""
    target: str = "v5e:16x16"
    """CHIP:TOPOLOGY: `v5e:16x16`, `2 x v5e:16x16` (slices), `v5p:4x4x4`, `h100:8`, `cpu:8`."""
    mesh: str = ""
    """Such as `data=2,fsdp=128`; by default fsdp over all devices."""
    batch: int = 4
    """Rows on each device; devices along `tensor` share theirs."""
    seq: int = 2048
    """Tokens of a row."""
    layers: int = 0
    """Blocks; 0 for those of the size."""
    remat: str = "full"
    """What the backward pass computes again: `none`, `full` or a policy of the model's."""
    loop: str = "scan"
    """Over blocks: `scan`, which compiles one, or `unroll`."""
    optimizer: str = "adamw"
    """`adamw`, `sgd`, `lion` or `adafactor`."""
    clip: float = 1.0
    """Largest norm of the gradients; 0 for none."""
    accumulate: int = 1
    """Microbatches a step."""
    rule: tuple[str, ...] = ()
    """PATTERN=VALUE, in front of the rules of every precision."""
    moments: str = ""
    """Format of the optimizer's moments, such as `int8@256`."""
    update: str = ""
    """Rule by which low weights are updated, such as `stochastic`."""
    search: bool = False
    """Also search for the largest batch on a device that fits; compiles several times."""
    out: Path = Path("runs/preflight")
    """Folder of the page and of the figures, forecast.json."""


def main(config: Config) -> None:
    """Compiles, prints the page and writes it."""
    launch.positive(config, "batch", "seq", "accumulate")
    launch.not_negative(config, "layers", "clip")
    launch.not_empty(config, "precision")
    launch.distinct(config, "precision")
    launch.writable(config.out)
    more: Settings = {"layers": config.layers} if config.layers else {}
    found = preflight(
        config.model, precision=config.precision, target=config.target, mesh=config.mesh,
        batch=config.batch, seq=config.seq, optimizer=config.optimizer,
        clip=config.clip or None, accumulate=config.accumulate, rules=config.rule,
        moments=config.moments or None, update=config.update or None, search=config.search,
        imports=imported_files(), tell=lambda line: print(line, flush=True), remat=config.remat,
        loop=config.loop, **more,
    )  # fmt: skip
    shape = ", ".join(f"{k}={n}" for k, n in found[0].mesh.items() if n > 1) or "one device"
    text = (
        f"# {config.model} on {config.target}\n\n{shape}; {config.batch} rows of {config.seq}"
        f" tokens on each device, remat {config.remat}, {config.optimizer}.\n\n{page(found)}\n"
    )
    config.out.mkdir(parents=True, exist_ok=True)
    write_text(config.out / "report.md", text)
    rows = [one.to_dict() for one in found]
    write_text(config.out / "forecast.json", json.dumps(rows, indent=1))
    print(text)
    print(f"report: {config.out / 'report.md'}")


if __name__ == "__main__":
    launch.command(main, Config)
