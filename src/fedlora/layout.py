"""Says which rows of a pass belong to which client, and draws each client's dropout.

Several clients share one forward and backward pass: their samples lie one client after the other,
so that every layer's input has a run of rows for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F


class LayoutError(RuntimeError):
    """A layer got rows that cannot be told apart by client; train one client at a time."""


@dataclass(frozen=True)
class Span:
    """Rows `begin` to `end` of a layer's input belong to this client (its place in the pass)."""

    client: int
    begin: int
    end: int


def spans_of(counts: Sequence[int]) -> tuple[Span, ...]:
    """Spans of so many rows for each client; clients without rows have none."""
    out, at = [], 0
    for client, count in enumerate(counts):
        if count:
            out.append(Span(client, at, at + count))
        at += count
    return tuple(out)


class Layout:
    """The pass that is running; shared by all layers of a model."""

    def __init__(self) -> None:
        self.bare = False
        self.mixing = False
        """Attention was found inside a module trained whole: its rows cannot be divided."""
        self._places: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self.whole = 0  # modules trained whole that are running
        self._spans: dict[int, tuple[Span, ...]] = {}
        self._seeds: Sequence[int] | None = None
        self._only: int | None = None

    @contextmanager
    def without_clients(self) -> Iterator[None]:
        """The base and what is frozen beside it, alone."""
        self.bare = True
        try:
            yield
        finally:
            self.bare = False

    @contextmanager
    def divided(self, spans: Mapping[int, tuple[Span, ...]]) -> Iterator[None]:
        """Inputs of so many rows are divided so. Tokens, samples and picked tokens differ."""
        before, self._spans = self._spans, dict(spans)
        try:
            yield
        finally:
            self._spans = before

    @contextmanager
    def only(self, client: int) -> Iterator[None]:
        """All rows are this client's."""
        self._only = client
        try:
            yield
        finally:
            self._only = None

    @contextmanager
    def seeded(self, seeds: Sequence[int]) -> Iterator[None]:
        """Draw dropout from a stream of each client's own, not from torch's."""
        self._seeds = seeds
        try:
            yield
        finally:
            self._seeds = None

    def spans(self, rows: int, clients: int) -> tuple[Span, ...]:
        """Who has which of so many rows.

        Raises:
            LayoutError: it is not known.
        """
        if clients == 1 or self._only is not None:
            return (Span(self._only or 0, 0, rows),)
        if rows not in self._spans:
            raise LayoutError(f"{rows} rows of {clients} clients cannot be told apart")
        return self._spans[rows]

    def place(self, module: Any) -> int:
        """A number of the module's own, in the order of their first use."""
        return self._places.setdefault(module, len(self._places))

    @property
    def streams(self) -> bool:
        """Whether every client has a stream of its own."""
        return self._seeds is not None

    def keep(
        self, client: int, site: int, shape: Sequence[int], dropout: float, device: torch.device
    ) -> Tensor:
        """Which entries dropout keeps, a bool tensor.

        With streams it depends on the client's seed and on the site alone, so that neither the
        other clients of the pass nor a recomputation change it.
        """
        if self._seeds is None:
            return F.dropout(torch.ones(tuple(shape), device=device), dropout) > 0
        source = torch.Generator(device).manual_seed(mixed(self._seeds[client], site))
        return torch.rand(tuple(shape), device=device, generator=source) >= dropout


def mixed(seed: int, number: int) -> int:
    """A 63-bit seed from a seed and a number (splitmix64): torch keeps only some of its bits."""
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1
