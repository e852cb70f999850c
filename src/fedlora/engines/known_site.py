"""Keeps what a server knows of a site from one question to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fedlora.engines.carrier import SiteError
from fedlora.federation.handshake import Counted, Joined

NONE_COUNTS: Counted = (0, 0)

T = TypeVar("T")


@dataclass
class Site:
    """A site as the engine sees it.

    Args:
        joined: what it has told.
        counted: its training that the last committed round counts.
        trained: its training in the round that goes on; None: none yet.
        holds: the round of the run whose global model it has confirmed last; None: none.
    """

    joined: Joined
    counted: Counted = NONE_COUNTS
    trained: Counted | None = None
    holds: int | None = None

    @property
    def name(self) -> str:
        """Its name."""
        return self.joined.site


def with_all_where_lost(ask: Callable[[int | None], T], held: int | None) -> T:
    """Ask a site for something that rests on the model it holds, or, where that is lost, on none.

    Args:
        ask: asks, given the round whose model the site holds.
        held: this round; None: it holds none.
    """
    try:
        return ask(held)
    except SiteError as error:
        if error.kind != "lost" or held is None:
            raise
    return ask(None)
