"""preflight: a training step compiled for chips that are not here, in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from mpjax.errors import ConfigError, brief, explains_calls, is_whole
from mpjax.files import write_text
from mpjax.models import decoder
from mpjax.models.core.sizes import FieldValue
from mpjax.optim import make_optimizer
from mpjax.optim.checks import is_number
from mpjax.precision import get_precision
from mpjax.targets.devices import clean_environment, parse_target, require_compiler
from mpjax.targets.figures import Forecast
from mpjax.typing import Settings

Tell = Callable[[str], None]


@explains_calls
def preflight(
    model: str = "llama-7b",
    *,
    precision: str | Sequence[str] = ("bf16",),
    target: str = "v5e:16x16",
    mesh: str = "",
    batch: int = 4,
    seq: int = 2048,
    optimizer: str = "adamw",
    clip: float | None = 1.0,
    accumulate: int = 1,
    rules: Sequence[str] = (),
    moments: str | None = None,
    update: str | None = None,
    search: bool = False,
    imports: Sequence[str] = (),
    tell: Tell | None = None,
    **settings: FieldValue,
) -> list[Forecast]:
    """Compiles a decoder's training step for chips that are not here; what it needs and takes.

    Another process compiles it, with an environment of its own: this one may have a GPU, or none.
    For a model of your own see `mpjax.targets.forecast`.

    Args:
      model: a size of `mpjax.models.decoder`.
      precision: presets, or lines of text; each is compiled.
      target: `v5e:16x16`, `2 x v5e:16x16`, `h100:8` or `cpu:8`; see `mpjax.targets.parse_target`.
      mesh: `data=2,fsdp=4`; by default fsdp over all devices.
      batch: rows on each device; devices along `tensor` share theirs.
      seq: tokens of a row.
      optimizer: see `mpjax.optim.make_optimizer`.
      clip: largest global gradient norm, or None.
      accumulate: microbatches a step.
      rules: of every precision, in front of its own.
      moments: format of the optimizer's moments.
      update: rule by which low weights are updated.
      search: also search for the largest batch on a device that fits.
      imports: Python files that register presets and recipes.
      tell: is told what is being compiled.
      **settings: fields of the decoder's config, such as `layers=2`; by default `remat="full"`,
        `loop="scan"`, and a context of `seq`.

    Returns:
      A forecast for each precision, in order.

    Raises:
      ConfigError: a name, a mesh or a target that cannot be, a compiler that is not installed.

    Example:
      >>> preflight("tiny", target="v5e:16")
      Traceback (most recent call last):
      mpjax.errors.ConfigError: target 'v5e:16': a topology of v5e has 2 axes, ...
    """
    there = parse_target(target)
    names = [precision] if isinstance(precision, str) else list(precision)
    if not names:
        raise ConfigError("preflight: no precision; name one, such as bf16")
    for name, value in (("batch", batch), ("seq", seq), ("accumulate", accumulate)):
        if not is_whole(value, 1):
            raise ConfigError(f"{name}: {brief(value)} is no whole number of 1 or more; give one")
    if not isinstance(mesh, str):
        raise ConfigError(f"mesh: {brief(mesh)} is no text; write data=2,fsdp=4, or nothing")
    if clip is not None and not (is_number(clip) and clip > 0):
        raise ConfigError(f"clip: {brief(clip)} is no number above 0; give one, or None")
    if not isinstance(search, bool):
        raise ConfigError(f"search: {brief(search)} is neither True nor False; give one of them")
    for many, texts in (("rules", rules), ("imports", imports)):
        if isinstance(texts, str) or not all(isinstance(one, str | Path) for one in texts):
            raise ConfigError(f"{many}: {brief(texts)} is no list of texts; give one, such as []")
    if tell is not None and not callable(tell):
        raise ConfigError(f"tell: {brief(tell)} is no function of a line; give one, or None")
    require_compiler(there)
    fixed: dict[str, FieldValue] = {"remat": "full", "loop": "scan", "context": seq}
    settings = fixed | settings
    if not imports:  # what they register is known to the other process
        for name in names:
            chosen = get_precision(name, rules=rules, moments=moments, update=update)
            decoder(model, chosen, **settings)
    make_optimizer(optimizer, 1e-4)
    spec = dict(
        model=model, precision=names, target=target, mesh=mesh, batch=batch, seq=seq,
        optimizer=optimizer, clip=clip, accumulate=accumulate, rules=list(rules), moments=moments,
        update=update, search=search, imports=[str(one) for one in imports], settings=settings,
    )  # fmt: skip
    return _in_child(spec, clean_environment(there), tell or (lambda line: None))


def _in_child(spec: Settings, environment: dict[str, str], tell: Tell) -> list[Forecast]:
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "spec.json"), Path(folder, "answer.json")
        write_text(asked, json.dumps(spec))
        command = [sys.executable, "-m", "mpjax.targets.child", str(asked), str(answer)]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as process,
        ):
            try:
                for line in process.stdout or ():
                    tell(line.rstrip())
                code = process.wait()
            finally:
                process.kill()
            errors.seek(0)
            said = errors.read().splitlines()
        for line in dict.fromkeys(line for line in said if "stays whole" in line):
            tell(line)
        if code or not answer.exists():
            last = [line for line in said if line.strip()][-1:]
            if code == -signal.SIGKILL:
                last = ["it was killed: this host may lack the memory that the compiler takes"]
            raise ConfigError(
                f"preflight: the process that compiles ended with status {code}"
                f" ({(last or ['it said nothing'])[0].strip()[:300]})"
            )
        found = json.loads(answer.read_text())
    if "error" in found:
        raise ConfigError(found["error"])
    return [Forecast.of(one) for one in found["forecasts"]]
