"""Draws by the seed which rows `max_train_samples` and `max_eval_samples` take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, TypeVar

from fedlora.seeds import SERVER, Purpose, generator

if TYPE_CHECKING:
    from fedlora.config.config import Config

T = TypeVar("T")


@dataclass(frozen=True)
class Subsets:
    """The rows that are taken, as ascending row numbers.

    Args:
        clients: of every client.
        eval: of the global evaluation.
        in_words: how many of how many, in words; empty where all are taken.
    """

    clients: list[list[int]]
    eval: list[int]
    in_words: tuple[str, ...]


def subsets(config: Config, clients: Sequence[int], evaluation: int) -> Subsets:
    """Draw rows without replacement where there are more than may be taken.

    They are drawn because a file may be sorted: its first rows might have a few labels only.

    Args:
        config: of the run, with the settings of single clients read.
        clients: the number of rows of every client.
        evaluation: that of the global evaluation.
    """
    parts = [
        drawn(number, config.of_client(k).max_train_samples, config.seed, k, Purpose.TRAIN_ROWS)
        for k, number in enumerate(clients)
    ]
    limit = config.max_eval_samples
    held_out = drawn(evaluation, limit, config.seed, SERVER, Purpose.EVAL_ROWS)
    in_words = []
    taken, total = sum(map(len, parts)), sum(clients)
    if taken < total:
        in_words.append(f"{taken:,} of {total:,} rows are trained on (max_train_samples)")
    if len(held_out) < evaluation:
        in_words.append(_evaluated(len(held_out), evaluation))
    return Subsets(parts, held_out, tuple(in_words))


def _evaluated(taken: int, total: int) -> str:
    return f"{taken:,} of {total:,} rows are evaluated on (max_eval_samples)"


def drawn(number: int, limit: int | None, seed: int, client: int, purpose: Purpose) -> list[int]:
    """Ascending row numbers, at most `limit` of `number`."""
    if limit is None or limit >= number:
        return list(range(number))
    chosen = generator(seed, 0, client, purpose).permutation(number)[:limit]
    return sorted(chosen.tolist())


def in_turn(
    parts: Sequence[Sequence[T]], limit: int | None, seed: int
) -> tuple[list[T], tuple[str, ...]]:
    """Collect the rows that clients held out, one of each client in turn.

    Args:
        parts: each client's held-out rows.
        limit: how many rows are taken in all; which ones of a client is drawn. None: all.
        seed: of the draws.

    Returns:
        The rows, and how many of how many in words.
    """
    number = sum(map(len, parts))
    if limit is None or limit >= number:
        return _turns(parts), ()
    sizes = [0] * len(parts)
    for client in _turns([[k] * len(part) for k, part in enumerate(parts)])[:limit]:
        sizes[client] += 1
    chosen = [
        [part[i] for i in drawn(len(part), size, seed, k, Purpose.EVAL_ROWS)]
        for k, (part, size) in enumerate(zip(parts, sizes, strict=True))
    ]
    return _turns(chosen), (_evaluated(limit, number),)


def _turns(parts: Iterable[Sequence[T]]) -> list[T]:
    nothing = object()
    turns = zip_longest(*parts, fillvalue=nothing)
    return [row for turn in turns for row in turn if row is not nothing]  # type: ignore[misc]
