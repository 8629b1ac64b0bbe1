"""Several processes that train together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpjax.lazy import lazy_names

if TYPE_CHECKING:
    from mpjax.train.processes.agreement import code_hash, of_first, require_agreement
    from mpjax.train.processes.peers import end, initialize, watched

# Imported at first use: a train step needs neither orbax nor progress bars nor writers.
_LAZY = {
    "code_hash": "agreement",
    "of_first": "agreement",
    "require_agreement": "agreement",
    "end": "peers",
    "initialize": "peers",
    "watched": "peers",
}

__all__ = [
    "code_hash",
    "end",
    "initialize",
    "of_first",
    "require_agreement",
    "watched",
]


def __getattr__(name: str) -> object:
    return lazy_names(__name__, _LAZY)(name)
