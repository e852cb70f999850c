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
class RowSubsets:
    """The rows that are taken, as ascending row numbers from 0.

    Args:
        clients: for each client.
        eval: for the global evaluation.
        in_words: sentences on how many of how many are taken; empty where all are.
    """

    clients: list[list[int]]
    eval: list[int]
    in_words: tuple[str, ...]


def draw_subsets(config: Config, client_rows: Sequence[int], eval_rows: int) -> RowSubsets:
    """Draw rows without replacement where there are more than may be taken.

    The first rows are not simply taken, because a file may be sorted: its beginning might hold a
    few of the labels only.

    Args:
        config: of the run, with the settings of single clients read.
        client_rows: the number of rows of every client.
        eval_rows: that of the global evaluation.
    """
    by_client = [
        drawn(
            number,
            config.of_client(client).max_train_samples,
            config.seed,
            client,
            Purpose.TRAIN_ROWS,
        )
        for client, number in enumerate(client_rows)
    ]
    limit = config.max_eval_samples
    evaluated = drawn(eval_rows, limit, config.seed, SERVER, Purpose.EVAL_ROWS)
    in_words = []
    taken, total = sum(map(len, by_client)), sum(client_rows)
    if taken < total:
        in_words.append(f"{taken:,} of {total:,} rows are trained on (max_train_samples)")
    if len(evaluated) < eval_rows:
        in_words.append(_rows_evaluated(len(evaluated), eval_rows))
    return RowSubsets(by_client, evaluated, tuple(in_words))


def _rows_evaluated(taken: int, total: int) -> str:
    return f"{taken:,} of {total:,} rows are evaluated on (max_eval_samples)"


def drawn(number: int, limit: int | None, seed: int, client: int, purpose: Purpose) -> list[int]:
    """Ascending row numbers: all of `number`, or `limit` of them drawn by the seed.

    Args:
        number: of rows there are.
        limit: at most so many are taken; None: all.
        seed, client, purpose: of the random draw (`fedlora.seeds.generator`).
    """
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
        limit: how many rows are taken in all; those of each client are drawn. None: all.
        seed: of the draws.

    Returns:
        The rows, and a sentence on how many of how many they are; none where all are taken.
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
    return _turns(chosen), (_rows_evaluated(limit, number),)


def _turns(parts: Iterable[Sequence[T]]) -> list[T]:
    """The first of each part, then the second of each that has one, and so on."""
    nothing = object()
    turns = zip_longest(*parts, fillvalue=nothing)
    return [row for turn in turns for row in turn if row is not nothing]  # type: ignore[misc]
