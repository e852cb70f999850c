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
"""Row numbers of one client, from 0, ascending."""
DRAWS = 1000
"""How often a division is drawn before it is given up that every client gets enough rows."""


def iid(
    num_rows: int, num_clients: int, rng: np.random.Generator, min_size: int = 1
) -> list[Indices]:
    """Divide rows at random into parts whose sizes differ by at most one row.

    Args:
        num_rows: to divide.
        num_clients: among whom.
        rng: of the draw.
        min_size: fewest rows of a client.

    Raises:
        InputError: too few rows.
    """
    _check_enough(num_rows, num_clients, min_size)
    return [np.sort(part) for part in np.array_split(rng.permutation(num_rows), num_clients)]


def dirichlet(
    labels: Sequence[Any],
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
    min_size: int = 1,
) -> list[Indices]:
    """Divide each label's rows among the clients in shares drawn from Dirichlet(alpha).

    This is the label skew of Hsu et al., arXiv 1909.06335: alpha near 0 gives a label to one
    client, a large alpha divides it evenly. It is drawn anew until every client has enough rows.

    Args:
        labels: of every row.
        num_clients: among whom rows are divided.
        alpha: the concentration, above 0.
        rng: of the draws.
        min_size: fewest rows of a client.

    Raises:
        InputError: too few rows, or no draw gave every client enough.
    """
    rows_by_label = _rows_by_value(labels)

    def draw() -> list[list[int]]:
        parts: list[list[int]] = [[] for _ in range(num_clients)]
        for label in sorted(rows_by_label):
            rows = rng.permutation(rows_by_label[label])
            shares = rng.dirichlet(np.full(num_clients, alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
            for part, chunk in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(chunk.tolist())
        return parts

    _check_enough(len(labels), num_clients, min_size)
    return _first_with_enough(draw, min_size, f"partition_alpha: {alpha}", len(labels), num_clients)


def quantity(
    num_rows: int,
    num_clients: int,
    alpha: float,
    rng: np.random.Generator,
    min_size: int = 1,
    shares: Sequence[float] | None = None,
) -> list[Indices]:
    """Divide rows at random in uneven amounts: by given shares, or drawn from Dirichlet(alpha).

    This is the quantity skew of Li et al., arXiv 2102.02079, section IV-C.

    Args:
        num_rows: to divide.
        num_clients: among whom.
        alpha: the concentration, above 0: near 0 amounts are very uneven.
        rng: of the draws.
        min_size: fewest rows of a client.
        shares: of each client, positive, in any unit; None: they are drawn, anew until every
            client has enough rows.

    Raises:
        InputError: too few rows, shares for another number of clients, or too small a share.
    """
    _check_enough(num_rows, num_clients, min_size)
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
    return _first_with_enough(draw, min_size, f"partition_alpha: {alpha}", num_rows, num_clients)


def few_labels(
    labels: Sequence[Any],
    num_clients: int,
    labels_per_client: int,
    rng: np.random.Generator,
    min_size: int = 1,
) -> list[Indices]:
    """Give every client rows of a few labels alone.

    This is the pathological division of McMahan et al., arXiv 1602.05629, and "#C = k" of Li et
    al., arXiv 2102.02079. Labels are dealt out so that the numbers of clients that hold each differ
    by at most one; a label's rows are divided evenly among these clients.

    Args:
        labels: of every row.
        num_clients: among whom rows are divided.
        labels_per_client: different labels of each client.
        rng: of the draws.
        min_size: fewest rows of a client.

    Raises:
        InputError: a client cannot have so many labels, or some label would have no holder.
    """
    rows_by_label = _rows_by_value(labels)
    names = sorted(rows_by_label)
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
    _check_enough(len(labels), num_clients, min_size)

    def draw() -> list[list[int]]:
        # How many clients each label still needs; those left over go to labels drawn at random.
        needed = np.full(len(names), num_clients * labels_per_client // len(names))
        needed[rng.permutation(len(names))[: num_clients * labels_per_client % len(names)]] += 1
        holders: list[list[int]] = [[] for _ in names]
        for client in rng.permutation(num_clients).tolist():
            # Labels that need most clients are given first: else the last clients would find too
            # few different labels left.
            order = np.lexsort((rng.random(len(names)), -needed))
            for label in order[:labels_per_client].tolist():
                holders[label].append(client)
                needed[label] -= 1
        parts: list[list[int]] = [[] for _ in range(num_clients)]
        for name, clients in zip(names, holders, strict=True):
            chunks = np.array_split(rng.permutation(rows_by_label[name]), len(clients))
            for client, chunk in zip(clients, chunks, strict=True):
                parts[client].extend(chunk.tolist())
        return parts

    setting = f"partition_labels_per_client: {labels_per_client}"
    return _first_with_enough(draw, min_size, setting, len(labels), num_clients)


def by_column(values: Sequence[Any]) -> tuple[list[Indices], list[str]]:
    """Make one client of each value of a column.

    Args:
        values: of every row.

    Returns:
        Each client's row numbers, and its value as text, in natural order of the values.
    """
    rows_by_value = _rows_by_value(values)
    names = sorted(rows_by_value, key=natural)
    return [np.array(rows_by_value[name], dtype=np.int64) for name in names], names


def _rows_by_value(values: Sequence[Any]) -> dict[str, list[int]]:
    """Value as text -> the numbers of the rows that have it."""
    out: dict[str, list[int]] = {}
    for row, value in enumerate(values):
        out.setdefault(str(value), []).append(row)
    return out


def _first_with_enough(
    draw: Callable[[], list[list[int]]], min_size: int, setting: str, num_rows: int, clients: int
) -> list[Indices]:
    """The first of `DRAWS` divisions in which every client has enough rows.

    Args:
        draw: makes a division: each client's row numbers.
        min_size: fewest rows of a client.
        setting: the key that makes divisions uneven, and its value, for the message.
        num_rows, clients: how many are divided among how many, for the message.

    Raises:
        InputError: there is none.
    """
    for _ in range(DRAWS):
        parts = draw()
        if min(map(len, parts)) >= min_size:
            return [np.sort(np.array(part, dtype=np.int64)) for part in parts]
    raise InputError(
        f"{setting} left a client with fewer than {min_size} rows (partition_min_size) in "
        f"{DRAWS:,} draws ({num_rows} rows, {clients} clients); use a larger one or fewer clients"
    )


def _check_enough(num_rows: int, num_clients: int, min_size: int) -> None:
    """Refuse fewer rows than the clients need at least."""
    if num_rows < num_clients * min_size:
        least = "" if min_size == 1 else f" and partition_min_size {min_size}"
        raise InputError(f"num_clients: {num_clients} clients{least} for {num_rows} rows of data")
