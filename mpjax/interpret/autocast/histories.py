"""The amax histories of one call under autocast: which product has which.

A function is evaluated twice: first by shapes alone, to find its products under delayed scaling in
the order of the program, then with a history for each. The iterations of a `scan` have a history
each, stacked as the layers of a model are, so that no cotangent of two of them is summed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from mpjax.errors import ConfigError, brief
from mpjax.formats.delayed import AmaxHistory
from mpjax.interpret.core.retrace import RecordKey, Records
from mpjax.precision import Recipe
from mpjax.typing import ModelState

Site: TypeAlias = RecordKey  # of a product: ids of the equations that hold it, and its own
Held: TypeAlias = dict[Site, AmaxHistory]
# What holds jaxprs and hands no further result out, and how a message calls it.
CLOSED = {
    "while": "a while loop", "shard_map": "a shard_map", "composite": "a composite",
    "custom_jvp_call": "a function with a derivative of its own",
    "custom_vjp_call": "a function with a derivative of its own",
    "custom_vmap_call": "a function with a rule of its own for vmap",
}  # fmt: skip


class Slot(NamedTuple):
    """A product that has a history.

    Args:
      steps: of the history.
      layers: lengths of the scans around it, the outermost first.
    """

    steps: int
    layers: tuple[int, ...]


class Histories:
    """The histories of a call; `slots` are found in its first evaluation."""

    def __init__(self) -> None:
        self.slots: dict[Site, Slot] = {}
        self._known: Held | None = None  # None while they are looked for
        self._site: Site = ()
        self._layers: tuple[int, ...] = ()
        self._closed = ""

    def empty(self) -> tuple[AmaxHistory, ...]:
        """Returns the state before the first step."""
        return tuple(AmaxHistory.empty(*slot) for slot in self.slots.values())

    def fill(self, state: ModelState) -> None:
        """Takes the histories of a state, in the order of the program.

        Raises:
          ConfigError: it is of another function, or no state.
        """
        wanted = [(*slot.layers, 3, slot.steps) for slot in self.slots.values()]
        histories = state if isinstance(state, tuple | list) else [state]
        if not all(isinstance(one, AmaxHistory) for one in histories):
            raise ConfigError(
                f"autocast: state is {brief(state)}; give what init_state of the same arguments"
                " returns, or the last call"
            )
        if (found := [one.history.shape for one in histories]) != wanted:
            raise ConfigError(
                f"autocast: state has histories of shapes {brief(found)}, the products of this call"
                f" {brief(wanted)}; give what init_state of the same arguments returns"
            )
        # Only the end of a step reads the history itself.
        short = [one._replace(history=one.history[..., :0]) for one in histories]
        self._known = dict(zip(self.slots, short, strict=True))

    def filled(self, state: Sequence[AmaxHistory], records: Records) -> tuple[AmaxHistory, ...]:
        """Returns a state with what a call observed; what did not run observed nothing."""
        return tuple(
            one._replace(observed_amax=jnp.maximum(one.observed_amax, records[site]))
            for site, one in zip(self.slots, state, strict=True)
        )

    @contextlib.contextmanager
    def inside(
        self, eqn: JaxprEqn, number: int, held: Mapping[Site, AmaxHistory], closed: str
    ) -> Iterator[None]:
        """While one of an equation's jaxprs is evaluated.

        Args:
          eqn: the equation.
          number: of the jaxpr.
          held: of a scan, the histories of an iteration.
          closed: what the equation is, if nothing can be handed out of it.
        """
        before = self._known, self._site, self._layers, self._closed
        self._site = (*self._site, id(eqn), number)
        if eqn.primitive.name == "scan":
            self._layers = (*self._layers, eqn.params["length"])
        if self._known is not None:
            self._known = self._known | dict(held)
        self._closed = self._closed or closed
        try:
            yield
        finally:
            self._known, self._site, self._layers, self._closed = before

    def below(self, eqn: JaxprEqn) -> Held:
        """Returns the histories of the products that an equation holds."""
        start = (*self._site, id(eqn))
        known = self._known or {}
        return {site: one for site, one in known.items() if site[: len(start)] == start}

    def of(self, eqn: JaxprEqn, recipe: Recipe, where: str) -> tuple[Site, AmaxHistory]:
        """Returns the site of a product and its history.

        Raises:
          ConfigError: the product is in something that hands no amax out.
        """
        site = (*self._site, id(eqn))
        if self._closed or (self._known is not None and site not in self._known):
            raise ConfigError(
                f"{where}: recipe {recipe.name!r} takes its scales from past steps, and the amax of"
                f" a product in {self._closed or 'a backward rule'} cannot be handed out; take fp8"
                " for this path, or leave it as it is by a rule such as '**/mlp=bf16'"
            )
        if self._known is not None:
            return site, self._known[site]
        self.slots[site] = Slot(recipe.history, self._layers)
        return site, AmaxHistory.empty(1)
