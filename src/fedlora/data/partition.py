"""Divides one data set among clients, as arrays of row numbers.

Every function gives each row to exactly one client, depends on its arguments and the generator
alone, and returns ascending row numbers, one array per client.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import InputError
from fedlora.text import natural

Indices = NDArray[np.int64]
"""Row numbers of one client, ascending."""
DRAWS = 1000
"""How often a division is drawn anew until every client has rows enough."""


def iid(
    num_rows: int, num_clients: int, rng: np.random.Generator, min_size: int = 1
) -> list[Indices]:
    """A random division into parts that differ by at most one row.

    Raises:
        InputError: too few rows.
    """
    _enough(num_rows, num_clients, min_size)
    return [np.sort(part) for part in np.array_split(rng.permutation(num_rows), num_clients)]


def dirichlet(
    labels: Sequence[Any],
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
    min_size: int = 1,
) -> list[Indices]:
    """Label skew: every label's rows go to the clients in shares drawn from Dirichlet(alpha).

    The division of Hsu et al., arXiv 1909.06335, label by label: alpha near 0 gives a label to one
    client, a large one divides it evenly.

    Raises:
        InputError: too few rows, or no draw gave every client enough.
    """
    of_label = _grouped(labels)

    def draw() -> list[list[int]]:
        parts: list[list[int]] = [[] for _ in range(num_clients)]
        for label in sorted(of_label):
            rows = rng.permutation(of_label[label])
            shares = rng.dirichlet(np.full(num_clients, alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
            for part, chunk in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(chunk.tolist())
        return parts

    _enough(len(labels), num_clients, min_size)
    return _drawn(draw, min_size, f"partition_alpha: {alpha}", len(labels), num_clients)


def quantity(
    num_rows: int,
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
    min_size: int = 1,
    shares: Sequence[float] | None = None,
) -> list[Indices]:
    """Quantity skew: iid rows, in amounts of the given shares or drawn from Dirichlet(alpha).

    Li et al., arXiv 2102.02079, section IV-C.

    Raises:
        InputError: too few rows, shares for another number of clients, or too small a share.
    """
    _enough(num_rows, num_clients, min_size)
    if shares is not None and len(shares) != num_clients:
        raise InputError(
            f"partition_shares: {len(shares)} shares for {num_clients} clients; give one for each"
        )

    def draw() -> list[list[int]]:
        sizes = rng.dirichlet(np.full(num_clients, alpha)) if shares is None else np.array(shares)
        cuts = np.round(np.cumsum(sizes / sizes.sum())[:-1] * num_rows).astype(int)
        return [part.tolist() for part in np.split(rng.permutation(num_rows), cuts)]

    if shares is not None:
        parts = draw()
        if (fewest := min(map(len, parts))) < min_size:
            raise InputError(
                f"partition_shares: the smallest client would have {fewest} of {num_rows} rows, "
                f"partition_min_size is {min_size}"
            )
        return [np.sort(np.array(part, dtype=np.int64)) for part in parts]
    return _drawn(draw, min_size, f"partition_alpha: {alpha}", num_rows, num_clients)


def few_labels(
    labels: Sequence[Any],
    num_clients: int,
    labels_per_client: int,
    rng: np.random.Generator,
    min_size: int = 1,
) -> list[Indices]:
    """Every client holds rows of a few labels alone (the pathological division of McMahan et al.,
    arXiv 1602.05629; "#C = k" of Li et al., arXiv 2102.02079).

    Labels are dealt out so that each has as many holders as any other, give or take one; its rows
    are divided evenly among them.

    Raises:
        InputError: a client cannot have so many labels, or some label would have no holder.
    """
    of_label = _grouped(labels)
    names = sorted(of_label)
    if labels_per_client > len(names):
        raise InputError(
            f"partition_labels_per_client: {labels_per_client}, but there are {len(names)} "
            "different values"
        )
    if num_clients * labels_per_client < len(names):
        raise InputError(
            f"partition_labels_per_client: {num_clients} clients of {labels_per_client} labels "
            f"leave some of the {len(names)} to nobody; use more"
        )
    _enough(len(labels), num_clients, min_size)

    def draw() -> list[list[int]]:
        slots = np.full(len(names), num_clients * labels_per_client // len(names))
        slots[rng.permutation(len(names))[: num_clients * labels_per_client % len(names)]] += 1
        holders: list[list[int]] = [[] for _ in names]
        for client in rng.permutation(num_clients).tolist():
            # Labels that still need most holders come first, so that each finds enough of them.
            order = np.lexsort((rng.random(len(names)), -slots))
            for label in order[:labels_per_client].tolist():
                holders[label].append(client)
                slots[label] -= 1
        parts: list[list[int]] = [[] for _ in range(num_clients)]
        for name, clients in zip(names, holders, strict=True):
            chunks = np.array_split(rng.permutation(of_label[name]), len(clients))
            for client, chunk in zip(clients, chunks, strict=True):
                parts[client].extend(chunk.tolist())
        return parts

    what = f"partition_labels_per_client: {labels_per_client}"
    return _drawn(draw, min_size, what, len(labels), num_clients)


def by_column(values: Sequence[Any]) -> tuple[list[Indices], list[str]]:
    """One client per value, in natural order; and the values."""
    of_value = _grouped(values)
    names = sorted(of_value, key=natural)
    return [np.array(of_value[name], dtype=np.int64) for name in names], names


def _grouped(values: Sequence[Any]) -> dict[str, list[int]]:
    """Value -> the rows that have it."""
    out: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        out.setdefault(str(value), []).append(row)
    return out


def _drawn(
    draw: Callable[[], list[list[int]]], min_size: int, what: str, num_rows: int, clients: int
) -> list[Indices]:
    """The first of `DRAWS` divisions in which every client has rows enough.

    Args:
        draw: makes a division: each client's row numbers.
        min_size: fewest rows of a client.
        what: the key that makes divisions uneven, for the message.
        num_rows, clients: that are divided, for the message.
    """
    for _ in range(DRAWS):
        parts = draw()
        if min(map(len, parts)) >= min_size:
            return [np.sort(np.array(part, dtype=np.int64)) for part in parts]
    raise InputError(
        f"{what} left a client with fewer than {min_size} rows (partition_min_size) in {DRAWS:,} "
        f"draws ({num_rows} rows, {clients} clients); use a larger one or fewer clients"
    )


def _enough(num_rows: int, num_clients: int, min_size: int) -> None:
    """Refuse fewer rows than the clients need at the least."""
    if num_rows < num_clients * min_size:
        least = "" if min_size == 1 else f" and partition_min_size {min_size}"
        raise InputError(f"num_clients: {num_clients} clients{least} for {num_rows} rows of data")
