"""Says which rows of a pass belong to which client, and draws each client's dropout.

Several clients share one forward and backward pass: their samples lie one client after the other,
so that every layer's input has a run of tokens, or of samples, for each of them. Where in a tensor
they lie is not guessed from its shape: a `Form` says it, which `find_rows` finds out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Tokens whose dropout is drawn at once where a pass runs in chunks."""


class MixedRowsError(RuntimeError):
    """A layer got rows that cannot be told apart by client; train one client at a time."""


@dataclass(frozen=True)
class Span:
    """Rows `begin` to `end` of a layer's input belong to this client (its slot in the pass).

    `first` is the number of the first of them among the client's own rows of the pass.
    """

    client: int
    begin: int
    end: int
    first: int = 0


def spans_of(counts: Sequence[int]) -> tuple[Span, ...]:
    """Spans of so many rows for each client; clients without rows have none."""
    out, at = [], 0
    for client, count in enumerate(counts):
        if count:
            out.append(Span(client, at, at + count))
        at += count
    return tuple(out)


def spans_within(spans: Sequence[Span], rows: slice) -> tuple[Span, ...]:
    """The parts of spans that lie in a slice of the rows, counted from the slice's beginning."""
    parts = []
    for span in spans:
        begin, end = max(span.begin, rows.start), min(span.end, rows.stop)
        if begin < end:
            first = span.first + begin - span.begin
            parts.append(Span(span.client, begin - rows.start, end - rows.start, first))
    return tuple(parts)


@dataclass(frozen=True)
class Form:
    """Where the tokens, or the samples, of a pass lie in a tensor.

    Args:
        axis: the axis they lie along.
        unit: "tokens" or "samples".
        multiples: how many entries of that axis each may have (heads, for example).
        apart: the entries of one do not follow each other: `(heads * tokens)`, not
            `(tokens * heads)`.
    """

    axis: int
    unit: str = "tokens"
    multiples: frozenset[int] = frozenset({1})
    apart: bool = False

    def _apart(self, x: Tensor, number: int) -> int:
        """Entries of each of `number` tokens.

        Raises:
            MixedRowsError: the axis is not that of so many.
        """
        each, rest = divmod(x.shape[self.axis], number)
        if rest or each not in self.multiples:
            raise MixedRowsError(f"{tuple(x.shape)} is no form of {number} {self.unit}")
        return each

    def narrow(self, x: Tensor, number: int, span: Span) -> Tensor:
        """The part of a tensor of `number` tokens that belongs to a span of them."""
        each, length = self._apart(x, number), span.end - span.begin
        if not self.apart:
            return x.narrow(self.axis, span.begin * each, length * each)
        parted: Tensor = x.unflatten(self.axis, (each, number))
        return parted.narrow(self.axis + 1, span.begin, length).flatten(self.axis, self.axis + 1)

    def join(self, parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """The tensor of these parts, of so many tokens each."""
        if not self.apart:
            for part, count in zip(parts, counts, strict=True):
                self._apart(part, count)
            return torch.cat(list(parts), self.axis)
        parted = [
            part.unflatten(self.axis, (self._apart(part, count), count))
            for part, count in zip(parts, counts, strict=True)
        ]
        return torch.cat(parted, self.axis + 1).flatten(self.axis, self.axis + 1)

    def in_order(self, x: Tensor) -> bool:
        """Whether flattening all axes but the last leaves the tokens in their order."""
        return not self.apart and all(size == 1 for size in x.shape[: self.axis])

    def first(self, x: Tensor, number: int) -> Tensor:
        """The tensor with the tokens along its first axis, each one's entries along the next."""
        moved = x.movedim(self.axis, 0)
        each = self._apart(x, number)
        if self.apart:
            return moved.reshape(each, number, *moved.shape[1:]).transpose(0, 1)
        return moved.reshape(number, each, *moved.shape[1:])

    def back(self, x: Tensor) -> Tensor:
        """What `first` makes undone; the last axis may have another size."""
        moved = x.transpose(0, 1) if self.apart else x
        return moved.flatten(0, 1).movedim(0, self.axis)


class ClientRows:
    """The pass that is running; shared by all layers of a model."""

    def __init__(self) -> None:
        self.bare = False
        self.mixing = False
        """Attention was found inside a module trained whole: its rows cannot be divided."""
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self.whole = 0  # modules trained whole that are running
        self._spans: Mapping[str, tuple[Span, ...]] = {}
        self._seeds: Sequence[int] | None = None
        self._only: int | None = None
        self._chunked = False
        self._drawn: dict[tuple[int, int], int] = {}

    @contextmanager
    def without_clients(self) -> Iterator[None]:
        """The base and what is frozen beside it, alone."""
        self.bare = True
        try:
            yield
        finally:
            self.bare = False

    @contextmanager
    def divided(self, chunked: bool = False, **spans: tuple[Span, ...]) -> Iterator[None]:
        """Who has which `tokens` and `samples` of a pass.

        Args:
            chunked: this is one of the chunks in which a part of the model runs: what a token
                draws is the same in whichever chunk it comes.
            spans: by unit, in order.
        """
        before = self._spans, self._chunked, self._drawn
        self._spans, self._chunked = spans, chunked
        self._drawn = dict(self._drawn) if chunked else {}
        try:
            yield
        finally:
            self._spans, self._chunked, self._drawn = before

    @contextmanager
    def only(self, client: int) -> Iterator[None]:
        """All rows are this client's: its own tokens and samples of the pass."""
        before = self._spans
        self._only, self._spans = (
            client,
            {
                unit: tuple(
                    Span(client, 0, s.end - s.begin, s.first) for s in spans if s.client == client
                )
                for unit, spans in before.items()
            },
        )
        try:
            yield
        finally:
            self._only, self._spans = None, before

    @contextmanager
    def seeded(self, seeds: Sequence[int]) -> Iterator[None]:
        """Draw dropout from a stream of each client's own, not from torch's; a pass begins."""
        before, self._seeds, self._drawn = self._drawn, seeds, {}
        try:
            yield
        finally:
            self._seeds, self._drawn = None, before

    def number(self, unit: str) -> int:
        """Tokens, or samples, of what runs now; 0: it is not known."""
        spans = self._spans.get(unit, ())
        return spans[-1].end if spans else 0

    def of_unit(self, unit: str) -> tuple[Span, ...]:
        """Who has which of the tokens, or samples, of what runs now."""
        return self._spans.get(unit, ())

    def spans(self, rows: int, clients: int, form: Form | None) -> tuple[Span, ...]:
        """Who has which of so many rows, in which the tokens lie in their order.

        Args:
            rows: of the flattened input.
            clients: of the pass.
            form: of the input; None: it is not known.

        Raises:
            MixedRowsError: it cannot be known.
        """
        number = 0 if form is None else self.number(form.unit)
        alone = clients == 1 or self._only is not None
        if form is None or not number or rows % number:
            if alone:
                return (Span(self._only or 0, 0, rows),)
            raise MixedRowsError(f"{rows} rows of {clients} clients cannot be told apart")
        each = rows // number
        return tuple(
            Span(s.client, s.begin * each, s.end * each, s.first * each)
            for s in self.of_unit(form.unit)
        )

    def number_of(self, module: Any) -> int:
        """A number of the module's own, in the order of their first use."""
        return self._numbers.setdefault(module, len(self._numbers))

    @property
    def sole(self) -> int | None:
        """The client that all rows belong to; None: they are of all clients of the pass."""
        return self._only

    @property
    def streams(self) -> bool:
        """Whether every client has a stream of its own."""
        return self._seeds is not None

    def keep(
        self,
        client: int,
        site: int,
        shape: Sequence[int],
        dropout: float,
        device: torch.device,
        first: int = 0,
        each: int = 1,
    ) -> Tensor:
        """Which entries dropout keeps, a bool tensor.

        With streams it depends on the client's seed, on the site and on how often the client came
        by it in this pass, so that neither the other clients of the pass nor a recomputation change
        it. In chunks it depends on the row's number among the client's own, not on the chunk.

        Args:
            client: whose.
            site: of the layer.
            shape: of the rows.
            dropout: the share that is dropped.
            device: of the result.
            first: the first row's number among the client's own.
            each: rows of each token.
        """
        if self._seeds is None:
            return (
                F.dropout(torch.ones(tuple(shape), dtype=torch.float32, device=device), dropout) > 0
            )
        times = self._drawn.get((client, site), 0)
        self._drawn[client, site] = times + 1
        seed = mix_seed(self._seeds[client], site)
        seed = (
            mix_seed(seed, times) if times else seed
        )  # a module that runs several times in a pass

        def drawn(seed: int, shape: Sequence[int]) -> Tensor:
            source = torch.Generator(device).manual_seed(seed)
            uniform = torch.rand(tuple(shape), dtype=torch.float32, device=device, generator=source)
            return uniform >= dropout

        if not self._chunked:
            return drawn(seed, shape)
        rows, size, parts = shape[0], BLOCK * each, []
        for block in range(first // size, -(-(first + rows) // size)):
            begin, end = max(first - block * size, 0), min(first + rows - block * size, size)
            whole = drawn(mix_seed(seed, -block) if block else seed, (size, *shape[1:]))
            parts.append(whole[begin:end])
        return torch.cat(parts)

    def recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `torch.utils.checkpoint`: a layer that is computed again draws what it drew.

        Returns:
            Contexts for the first computation and for the second.
        """
        drawn = dict(self._drawn)

        @contextmanager
        def as_then() -> Iterator[None]:
            now, self._drawn = self._drawn, dict(drawn)
            try:
                yield
            finally:
                self._drawn = now

        return nullcontext(), as_then()


def mix_seed(seed: int, number: int) -> int:
    """A 63-bit seed from a seed and a number (splitmix64): torch keeps only some of its bits."""
    x = (seed + (number + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1
