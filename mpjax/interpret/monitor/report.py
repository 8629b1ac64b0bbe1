"""What a monitor measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np

from mpjax.interpret.monitor.statistics import Statistics
from mpjax.typing import Array

KINDS = ("weights", "activations", "gradients", "activation_gradients", "updates")
Row: TypeAlias = dict[str, str | int | float | None]


class Monitored(NamedTuple):
    """What `monitor` measured: name -> statistics, by kind; a pytree.

    Names are module paths; behind a colon stands which tensor of the module it is (`lhs`, `rhs`
    and `product` of a product, numbered where there are several; `operand`, the gradient of an
    operand; `output`). Weights, gradients and updates have the paths of the weights.

    Args:
      weights: as stored.
      activations: of the forward pass.
      gradients: of weights, as the backward pass leaves them, so scaled by the loss scale.
      activation_gradients: of the backward pass, scaled likewise.
      updates: new weights minus old ones.
      unchanged: share of a weight's numbers whose bits an update does not move.
      logit_max: largest number that goes into a softmax behind a product.
      gradient_ratio: root mean square of g / sqrt(v), as Adam's step divides.
    """

    weights: dict[str, Statistics]
    activations: dict[str, Statistics]
    gradients: dict[str, Statistics]
    activation_gradients: dict[str, Statistics]
    updates: dict[str, Statistics]
    unchanged: dict[str, Array]
    logit_max: dict[str, Array]
    gradient_ratio: dict[str, Array]

    def rows(self) -> Iterator[Row]:
        """Yields a flat record for each tensor and layer, with Python numbers.

        Keys: `kind`, `name`, `layer` (None where there is but one), `size`, `amax`, `max`, `mean`,
        `rms`, `zeros`, `subnormal`, `infinite`, `nan`, for each format `underflow/F`, `overflow/F`
        and `sqnr/F` (with ` scaled` behind F for one scale a tensor); where known `unchanged`,
        `logit_max` and `gradient_ratio`. A tensor of a branch that did not run has no record.
        """
        host = jax.device_get(self)
        for kind in KINDS:
            for name, found in getattr(host, kind).items():
                for layer, values in _layers(found.layers, _columns(found)):
                    if values["size"]:
                        yield {"kind": kind, "name": name, "layer": layer} | values
        for kind in ("unchanged", "logit_max", "gradient_ratio"):
            for name, value in getattr(host, kind).items():
                for layer, values in _layers(np.shape(value), {kind: value}):
                    yield {"kind": kind, "name": name, "layer": layer} | values


def _columns(found: Statistics) -> dict[str, Array | np.ndarray]:
    names = ("size", "amax", "max", "mean", "rms", "zeros", "subnormal", "infinite", "nan")
    with np.errstate(invalid="ignore"):  # shares of no numbers, which `rows` leaves out
        columns = {name: getattr(found, name) for name in names}
        for c in found.formats:
            label = f"{c.name} scaled" if c.scaled else c.name
            columns[f"underflow/{label}"] = found.underflow(c.name, c.scaled)
            columns[f"overflow/{label}"] = found.overflow(c.name, c.scaled)
            columns[f"sqnr/{label}"] = found.sqnr(c.name, c.scaled)
    return columns


def _layers(
    shape: Sequence[int], columns: Mapping[str, Array | np.ndarray]
) -> Iterator[tuple[int | None, Row]]:
    for index in np.ndindex(*shape):
        layer = None if not index else int(np.ravel_multi_index(index, tuple(shape)))
        yield layer, {key: np.asarray(value)[index].item() for key, value in columns.items()}
