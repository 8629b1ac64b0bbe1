"""Types of the interfaces, and what a model must have so that `mpjax.train` can train it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike, DTypeLike

if TYPE_CHECKING:
    from typing import Self

    from mpjax.precision import Precision

__all__ = [
    "Array",
    "ArrayLike",
    "Axes",
    "Batch",
    "DType",
    "DTypeLike",
    "Grads",
    "Json",
    "Key",
    "LossFn",
    "LossModel",
    "Metrics",
    "Model",
    "ModelState",
    "Params",
    "PyTree",
    "Scalar",
    "Settings",
    "Shape",
    "Shard",
    "Sources",
    "Tree",
]

Array: TypeAlias = jax.Array
Scalar: TypeAlias = "jax.Array | np.generic | float"  # a number, on a device or not
Key: TypeAlias = jax.Array  # a typed key of `jax.random.key`
DType: TypeAlias = np.dtype[Any]
Shape: TypeAlias = tuple[int, ...]
Axes: TypeAlias = tuple[str | None, ...]  # a logical axis for each dimension

# Arrays in containers, or in modules of any library: whatever JAX flattens. No type says more.
PyTree: TypeAlias = Any
Params: TypeAlias = PyTree  # weights
Grads: TypeAlias = PyTree  # of the structure of the weights
Batch: TypeAlias = PyTree  # name -> array for the models here; any pytree for others
ModelState: TypeAlias = PyTree  # what a model threads through its calls; None if nothing
Tree = TypeVar("Tree")  # a pytree that is returned with the structure that it came in

Metrics: TypeAlias = dict[str, jax.Array]  # scalars on the device
Json: TypeAlias = Any  # what `json.loads` returns
Settings: TypeAlias = dict[str, Any]  # name -> value, as a configuration file has them

T = TypeVar("T")
Sources: TypeAlias = Mapping[str, Callable[[], T]]  # name of a data set -> what reads it

# Constrains an array to logical axes, `shard(x, axes) -> x`.
Shard: TypeAlias = Callable[[jax.Array, Axes], jax.Array]


class LossFn(Protocol):
    """A mean loss over the targets of a batch, and the model's next state."""

    def __call__(
        self, params: Params, batch: Batch, /, *, state: ModelState, key: Key, train: bool
    ) -> tuple[Array, ModelState]: ...


class Model(Protocol):
    """What `mpjax.train.build` asks of a model; those of `mpjax.models` have it.

    With `build`'s default objective it has a loss, see `LossModel`. A model that threads a state
    also has `init_state() -> ModelState`. A schedule of several precisions makes copies with
    `dataclasses.replace(model, precision=...)`.

    Example:
      >>> from mpjax.models import decoder
      >>> model: Model = decoder("tiny", layers=1, width=16, heads=2)
      >>> model.precision.name
      'fp32'
    """

    @property
    def precision(self) -> Precision:
        """The Precision that the model carries."""

    @property
    def axes(self) -> PyTree:
        """`Axes` of each parameter."""

    def init(self, key: Key, /) -> Params:
        """Returns new parameters."""

    def sharded(self, shard: Shard, /) -> Self:
        """Returns the model with its activations constrained by `shard`."""


class LossModel(Model, Protocol):
    """A model with a loss of its own, which `mpjax.ops.Objective.of_model` takes."""

    def loss(
        self, params: Params, batch: Batch, /, *, state: ModelState, key: Key, train: bool
    ) -> tuple[Array, ModelState]:
        """Returns the mean loss over the targets of a batch, and the next state."""
