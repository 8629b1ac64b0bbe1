"""How `flax.serialization` writes and reads our pytree nodes: by name, settings beside the arrays.

Only `mpjax.models` imports Flax, and Flax knows a class by its exact type. So the classes are
registered when `flax.serialization` is first imported, by any module and in any order.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TypeAlias

import jax

from mpjax.errors import ConfigError, brief
from mpjax.formats import Quantized
from mpjax.optim.loss_scale.leaf_scale import LeafLossScale
from mpjax.optim.loss_scale.logmax import LogMaxLossScale
from mpjax.optim.loss_scale.multi_loss import MultiLossScale
from mpjax.optim.loss_scale.scalers import (
    DynamicLossScale,
    LossScale,
    NoOpLossScale,
    StaticLossScale,
)
from mpjax.optim.moments.blockwise import Blockwise
from mpjax.paths import leaves_with_names
from mpjax.typing import Array

MODULE = "flax.serialization"
_SCALES = (
    LossScale, NoOpLossScale, StaticLossScale, DynamicLossScale, LogMaxLossScale, LeafLossScale,
)  # fmt: skip
Node: TypeAlias = LossScale | MultiLossScale | Blockwise | Quantized
NodeState: TypeAlias = dict[str, str | Array]  # the settings as text, and the arrays by name
_SETTINGS = "settings"  # a text, which is compared with that of the target


def _settings(node: Node) -> str:
    """What of a node is no array, as one text."""
    if isinstance(node, MultiLossScale):
        return "; ".join(_settings(scale) for scale in node.scales)
    if isinstance(node, LossScale):
        return str(node.settings)
    if isinstance(node, Blockwise):
        return f"{node.format} signed={node.signed} shape={node.shape}"
    dtype = jax.numpy.dtype(node.dtype).name
    return f"{node.format.name} tile={node.tile} of {dtype}, scales of {node.scale_bits} bits"


def to_state_dict(node: Node) -> NodeState:
    """Returns a node's arrays by their names, and its settings as a text.

    Example:
      >>> from mpjax.optim import StaticLossScale
      >>> to_state_dict(StaticLossScale(8.0))["settings"]
      'static:8'
    """
    return {_SETTINGS: _settings(node), **dict(leaves_with_names(node))}


def from_state_dict(target: Node, state: NodeState) -> Node:
    """Returns a node like the target with the arrays of a state.

    Raises:
      ConfigError: the state is of another class or of other settings.
    """
    where, want = type(target).__name__, to_state_dict(target)
    if not isinstance(state, dict) or set(state) != set(want):
        found = " ".join(sorted(state)) if isinstance(state, dict) else brief(state)
        raise ConfigError(
            f"{where}: the saved state holds {found}, expected {' '.join(sorted(want))}; restore"
            " into the optimizer or weights that were saved"
        )
    if state[_SETTINGS] != want[_SETTINGS]:
        raise ConfigError(
            f"{where}: saved with {state[_SETTINGS]}, and the target has {want[_SETTINGS]}; make"
            " the target with the settings that were saved"
        )
    names = [name for name in want if name != _SETTINGS]
    return jax.tree.unflatten(jax.tree.structure(target), [state[name] for name in names])


def register(serialization: ModuleType) -> None:
    """Tells the module `flax.serialization` of our classes."""
    add = serialization.register_serialization_state
    for kind in (*_SCALES, MultiLossScale, Blockwise, Quantized):
        add(kind, to_state_dict, from_state_dict, override=True)


class _Finder:
    """Finds `flax.serialization` as others would, and registers our classes once it has run."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Returns the module's spec the one time that it is asked for; None for all others."""
        if name != MODULE or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        run: Callable[[ModuleType], None] = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            register(module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Registers our classes with Flax now, if it is imported already, or as soon as it is."""
    if MODULE in sys.modules:
        register(sys.modules[MODULE])
    else:
        sys.meta_path.insert(0, _Finder())
