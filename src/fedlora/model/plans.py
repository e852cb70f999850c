"""Decides which rows share a pass: those a model can run together, up to a number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fedlora.data.tokenize import Tokens

PassKind = tuple[bool, int]
"""How a row is run: through the model's own forward pass or not, and which rows may share it."""


@dataclass
class PlannedPass:
    """One pass of a step.

    Args:
        kind: of all its rows.
        rows: by client.
        numbers: by client, of which of its passes in this step it is.
    """

    kind: PassKind
    rows: dict[int, list[Tokens]]
    numbers: dict[int, int]

    @property
    def own(self) -> bool:
        """Through the model's own forward pass, client by client; else packed."""
        return self.kind[0]

    @property
    def tokens(self) -> int:
        """Of all its rows."""
        return sum(len(row["input_ids"]) for rows in self.rows.values() for row in rows)


def plan_passes(
    parts: Sequence[Sequence[Tokens]], kind: Callable[[int], PassKind], longest: int
) -> list[PlannedPass]:
    """The passes of these rows; nearly always it is one.

    Which of a client's rows are run together depends on its own rows alone, as its dropout does.

    Args:
        parts: each client's rows.
        kind: of a row of so many tokens.
        longest: tokens of a packed pass.
    """
    passes = list[PlannedPass]()
    for client, part in enumerate(parts):
        chunks = list[PlannedPass]()
        for row in part:
            length = len(row["input_ids"])
            how = kind(length)
            last = next((c for c in reversed(chunks) if c.kind == how), None)
            if last is None or (not last.own and last.tokens + length > longest):
                last = PlannedPass(how, {client: []}, {client: len(chunks)})
                chunks.append(last)
            last.rows[client].append(row)
        for chunk in chunks:
            for other in passes:
                fits = other.own or other.tokens + chunk.tokens <= longest
                if other.kind == chunk.kind and fits and client not in other.rows:
                    other.rows |= chunk.rows
                    other.numbers |= chunk.numbers
                    break
            else:
                passes.append(chunk)
    return passes


def consecutive_passes(
    rows: Sequence[Tokens], kind: Callable[[int], PassKind], longest: int
) -> Iterator[tuple[bool, Sequence[Tokens]]]:
    """Rows in their order, cut into runs that can share a pass.

    Yields:
        As `PlannedPass.own`, and the rows.
    """
    at = 0
    while at < len(rows):
        how, end, tokens = kind(len(rows[at]["input_ids"])), at, 0
        while end < len(rows):
            length = len(rows[end]["input_ids"])
            full = not how[0] and end > at and tokens + length > longest
            if full or kind(length) != how:
                break
            end, tokens = end + 1, tokens + length
        yield how[0], rows[at:end]
        at = end
