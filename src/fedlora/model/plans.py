"""Decides which rows share a pass: those a model can run together, up to a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fedlora.data.tokenize import Tokens


class PassKind(NamedTuple):
    """How a row is run. Rows may share a pass only if their kinds are equal.

    Args:
        padded: by the model's own forward pass with padding, client by client; else packed.
        group: which rows may share the pass: those of one length, or with the same rotary factors.
    """

    padded: bool
    group: int


@dataclass
class PlannedPass:
    """One pass of a step.

    Args:
        kind: of all its rows.
        rows: by client.
        numbers: by client, which of the client's passes in this step it is, from 0.
    """

    kind: PassKind
    rows: dict[int, list[Tokens]]
    numbers: dict[int, int]

    @property
    def padded(self) -> bool:
        """See `PassKind`."""
        return self.kind.padded

    @property
    def tokens(self) -> int:
        """Of all its rows."""
        return sum(len(row["input_ids"]) for rows in self.rows.values() for row in rows)


def plan_passes(
    parts: Sequence[Sequence[Tokens]], kind: Callable[[int], PassKind], longest: int
) -> list[PlannedPass]:
    """Divide the rows of a step among passes; nearly always a single one is enough.

    Which of a client's rows are run together depends on that client's rows alone. Dropout is drawn
    pass by pass, so a client draws the same whether or not others train beside it.

    Args:
        parts: each client's rows.
        kind: number of tokens of a row -> how it is run.
        longest: most tokens of a packed pass.
    """
    passes = list[PlannedPass]()
    for client, rows in enumerate(parts):
        for chunk in _of_one_client(client, rows, kind, longest):
            shared = next((p for p in passes if _has_room(p, chunk, client, longest)), None)
            if shared is None:
                passes.append(chunk)
            else:
                shared.rows |= chunk.rows
                shared.numbers |= chunk.numbers
    return passes


def _of_one_client(
    client: int, rows: Sequence[Tokens], kind: Callable[[int], PassKind], longest: int
) -> list[PlannedPass]:
    """The passes a client's rows would be run in if it were alone."""
    chunks = list[PlannedPass]()
    for row in rows:
        length = len(row["input_ids"])
        row_kind = kind(length)
        chunk = next((c for c in reversed(chunks) if c.kind == row_kind), None)
        if chunk is None or (not chunk.padded and chunk.tokens + length > longest):
            chunk = PlannedPass(row_kind, {client: []}, {client: len(chunks)})
            chunks.append(chunk)
        chunk.rows[client].append(row)
    return chunks


def _has_room(shared: PlannedPass, chunk: PlannedPass, client: int, longest: int) -> bool:
    """Whether a client's chunk may join a pass of other clients."""
    if shared.kind != chunk.kind or client in shared.rows:
        return False
    return shared.padded or shared.tokens + chunk.tokens <= longest


def consecutive_passes(
    rows: Sequence[Tokens], kind: Callable[[int], PassKind], longest: int
) -> Iterator[tuple[bool, Sequence[Tokens]]]:
    """Rows in their order, cut into runs that can share a pass.

    Yields:
        Whether the run is padded, see `PassKind`, and its rows.
    """
    begin = 0
    while begin < len(rows):
        row_kind, end, tokens = kind(len(rows[begin]["input_ids"])), begin, 0
        while end < len(rows):
            length = len(rows[end]["input_ids"])
            full = not row_kind.padded and end > begin and tokens + length > longest
            if full or kind(length) != row_kind:
                break
            end, tokens = end + 1, tokens + length
        yield row_kind.padded, rows[begin:end]
        begin = end
