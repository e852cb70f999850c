"""Says which rows of a pass belong to which client, and draws each client's dropout.

Several clients share one forward and backward pass. Their samples lie one client after the other,
so every layer's input holds a span of tokens (or samples) for each client. Where these lie in a
tensor is not guessed from its shape: a `RowLayout` says it, which `find_rows` measures.
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
"""Where a pass runs in chunks, the dropout of so many tokens of a client is drawn at once."""


class MixedRowsError(RuntimeError):
    """A layer cannot tell which rows belong to which client; train one client at a time."""


@dataclass(frozen=True)
class ClientSpan:
    """Tokens, or samples, `begin` to `end` of a pass belong to one client.

    Args:
        client: its slot in the pass.
        begin, end: the range, `end` excluded.
        first: the number of the first of them among the client's own of this pass.
    """

    client: int
    begin: int
    end: int
    first: int = 0


def spans_of(counts: Sequence[int]) -> tuple[ClientSpan, ...]:
    """The clients' spans, one after the other, from how many rows each client has.

    A client without rows has no span.
    """
    spans, begin = [], 0
    for client, count in enumerate(counts):
        if count:
            spans.append(ClientSpan(client, begin, begin + count))
        begin += count
    return tuple(spans)


def spans_within(spans: Sequence[ClientSpan], rows: slice) -> tuple[ClientSpan, ...]:
    """The parts of spans that lie in a slice of the rows, counted from the slice's beginning."""
    parts = []
    for span in spans:
        begin, end = max(span.begin, rows.start), min(span.end, rows.stop)
        if begin < end:
            first = span.first + begin - span.begin
            parts.append(ClientSpan(span.client, begin - rows.start, end - rows.start, first))
    return tuple(parts)


@dataclass(frozen=True)
class RowLayout:
    """Where the tokens (or samples) of a pass lie in a tensor.

    A token may have several entries along its axis, one for each attention head for example:
    `(tokens * heads)` where they follow each other, `(heads * tokens)` where they are strided.

    Args:
        axis: the axis along which the tokens lie.
        unit: "tokens" or "samples".
        multiples: how many entries of that axis a token may have.
        strided: the entries of one token do not follow each other.
    """

    axis: int
    unit: str = "tokens"
    multiples: frozenset[int] = frozenset({1})
    strided: bool = False

    def _entries_each(self, x: Tensor, count: int) -> int:
        """How many entries of the axis each of `count` tokens has.

        Raises:
            MixedRowsError: the axis does not divide into so many tokens.
        """
        each, rest = divmod(x.shape[self.axis], count)
        if rest or each not in self.multiples:
            raise MixedRowsError(f"{tuple(x.shape)} is no form of {count} {self.unit}")
        return each

    def narrow(self, x: Tensor, count: int, span: ClientSpan) -> Tensor:
        """The part of a tensor of `count` tokens that belongs to a span of them."""
        each, length = self._entries_each(x, count), span.end - span.begin
        if not self.strided:
            return x.narrow(self.axis, span.begin * each, length * each)
        by_entry: Tensor = x.unflatten(self.axis, (each, count))
        return by_entry.narrow(self.axis + 1, span.begin, length).flatten(self.axis, self.axis + 1)

    def join(self, parts: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """Puts together what `narrow` divided: parts of `counts` tokens each."""
        if not self.strided:
            for part, count in zip(parts, counts, strict=True):
                self._entries_each(part, count)
            return torch.cat(list(parts), self.axis)
        by_entry = [
            part.unflatten(self.axis, (self._entries_each(part, count), count))
            for part, count in zip(parts, counts, strict=True)
        ]
        return torch.cat(by_entry, self.axis + 1).flatten(self.axis, self.axis + 1)

    def in_order(self, x: Tensor) -> bool:
        """Whether flattening all axes but the last leaves the tokens in their order."""
        return not self.strided and all(size == 1 for size in x.shape[: self.axis])

    def rows_first(self, x: Tensor, count: int) -> Tensor:
        """The tensor as `(count, entries of each token, ...all other axes)`."""
        moved = x.movedim(self.axis, 0)
        each = self._entries_each(x, count)
        if self.strided:
            return moved.reshape(each, count, *moved.shape[1:]).transpose(0, 1)
        return moved.reshape(count, each, *moved.shape[1:])

    def undo_rows_first(self, x: Tensor) -> Tensor:
        """The inverse of `rows_first`; the size of the last axis may have changed in between."""
        moved = x.transpose(0, 1) if self.strided else x
        return moved.flatten(0, 1).movedim(0, self.axis)


class ClientRows:
    """Which client each row of the running pass belongs to; one object for all layers of a model.

    Attributes:
        base_only: adapters and copies of modules trained whole are left out of the pass.
        mixing: attention was found inside a module trained whole, so its rows cannot be divided.
        running_full_modules: how many modules trained whole are running, one inside the other.
    """

    def __init__(self) -> None:
        self.base_only = False
        self.mixing = False
        self.running_full_modules = 0
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._spans: Mapping[str, tuple[ClientSpan, ...]] = {}
        self._seeds: Sequence[int] | None = None
        self._only: int | None = None
        self._chunked = False
        self._drawn: dict[tuple[int, int], int] = {}

    @contextmanager
    def without_clients(self) -> Iterator[None]:
        """Run the base and what is frozen beside it alone, without any client's adapter."""
        self.base_only = True
        try:
            yield
        finally:
            self.base_only = False

    @contextmanager
    def divided(self, chunked: bool = False, **spans: tuple[ClientSpan, ...]) -> Iterator[None]:
        """Set which `tokens` and `samples` of the pass belong to which client.

        Args:
            chunked: a part of the model (the head) runs in chunks, and this is one of them. What
                dropout draws for a token is then the same whichever chunk the token is in.
            spans: unit -> the clients' spans, in order.
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
        """Run a part of the model on the rows of one client, those it has in this pass."""
        before = self._spans
        self._only = client
        self._spans = {
            unit: tuple(
                ClientSpan(client, 0, span.end - span.begin, span.first)
                for span in spans
                if span.client == client
            )
            for unit, spans in before.items()
        }
        try:
            yield
        finally:
            self._only, self._spans = None, before

    @contextmanager
    def seeded(self, seeds: Sequence[int]) -> Iterator[None]:
        """Begin a pass whose dropout is drawn from a seed of each client, not by torch."""
        before, self._seeds, self._drawn = self._drawn, seeds, {}
        try:
            yield
        finally:
            self._seeds, self._drawn = None, before

    def count(self, unit: str) -> int:
        """How many tokens (or samples) run now; 0 where that is not known."""
        spans = self._spans.get(unit, ())
        return spans[-1].end if spans else 0

    def spans_by_unit(self, unit: str) -> tuple[ClientSpan, ...]:
        """The clients' spans of the tokens (or samples) that run now."""
        return self._spans.get(unit, ())

    def spans(
        self, num_rows: int, num_clients: int, layout: RowLayout | None
    ) -> tuple[ClientSpan, ...]:
        """The clients' spans of a layer's input, flattened to rows in the order of the tokens.

        Args:
            num_rows: of the flattened input, `entries of each token * tokens`.
            num_clients: of the pass.
            layout: of the input before it was flattened; None where it is not known.

        Raises:
            MixedRowsError: there are several clients, and no way to tell their rows apart.
        """
        count = 0 if layout is None else self.count(layout.unit)
        if layout is None or not count or num_rows % count:
            if num_clients == 1 or self._only is not None:
                return (ClientSpan(self._only or 0, 0, num_rows),)
            raise MixedRowsError(f"{num_rows} rows of {num_clients} clients cannot be told apart")
        each = num_rows // count
        return tuple(
            ClientSpan(s.client, s.begin * each, s.end * each, s.first * each)
            for s in self.spans_by_unit(layout.unit)
        )

    def number_of(self, module: Any) -> int:
        """A number for the module, given in the order in which modules first ask for theirs."""
        return self._numbers.setdefault(module, len(self._numbers))

    @property
    def only_client(self) -> int | None:
        """The client all rows belong to while `only` runs; None: rows of all clients run."""
        return self._only

    @property
    def has_streams(self) -> bool:
        """Whether dropout is drawn from each client's own stream (see `seeded`)."""
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
        """The entries that dropout keeps, a bool tensor of this shape.

        With streams, the mask depends on the client's seed, the site, and how often the client has
        been at this site in this pass. So neither the other clients of the pass nor recomputing a
        layer changes it. In chunks it depends on the row's number among the client's own rows, and
        not on how rows are divided into chunks.

        Args:
            client: whose rows these are.
            site: number of the layer that drops.
            shape: `(rows, width)`.
            dropout: share of entries that is dropped.
            device: of the result.
            first: the first row's number among the client's own.
            each: rows of each token.
        """
        if self._seeds is None:
            ones = torch.ones(tuple(shape), dtype=torch.float32, device=device)
            return F.dropout(ones, dropout) > 0
        visits = self._drawn.get((client, site), 0)
        self._drawn[client, site] = visits + 1
        seed = mix_seed(self._seeds[client], site)
        if visits:  # a module that runs several times in a pass
            seed = mix_seed(seed, visits)

        def drawn(seed: int, shape: Sequence[int]) -> Tensor:
            if device.type == "meta":  # a pass of shapes alone draws nothing
                return torch.empty(tuple(shape), dtype=torch.float32, device=device) >= dropout
            source = torch.Generator(device).manual_seed(seed)
            uniform = torch.rand(tuple(shape), dtype=torch.float32, device=device, generator=source)
            return uniform >= dropout

        if not self._chunked:
            return drawn(seed, shape)
        num_rows, size, parts = shape[0], BLOCK * each, []
        for block in range(first // size, -(-(first + num_rows) // size)):
            begin, end = max(first - block * size, 0), min(first + num_rows - block * size, size)
            mask = drawn(mix_seed(seed, -block) if block else seed, (size, *shape[1:]))
            parts.append(mask[begin:end])
        return torch.cat(parts)

    def recomputing(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Make a layer that `torch.utils.checkpoint` computes again draw the same dropout.

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
