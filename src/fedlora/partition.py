"""Who holds which rows: one data set divided among clients, as arrays of row numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.errors import InputError

Indices = NDArray[np.int64]


def iid(num_rows: int, num_clients: int, rng: np.random.Generator) -> list[Indices]:
    """A random division into parts that differ by at most one row.

    Raises:
        InputError: fewer rows than clients.
    """
    _enough(num_rows, num_clients)
    return [np.sort(part) for part in np.array_split(rng.permutation(num_rows), num_clients)]


def dirichlet(
    labels: Sequence[Any], num_clients: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    """Label skew: every label's rows go to the clients in shares drawn from Dirichlet(alpha).

    The division of Hsu et al., arXiv 1909.06335, label by label: alpha near 0 gives a label to one
    client, a large one divides it evenly. Shares are drawn again, up to 1,000 times, until every
    client has a row.

    Raises:
        InputError: fewer rows than clients, or no draw gave every client a row.
    """
    _enough(len(labels), num_clients)
    of_label: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        of_label.setdefault(str(label), []).append(row)
    for _ in range(1000):
        parts: list[list[int]] = [[] for _ in range(num_clients)]
        for label in sorted(of_label):
            rows = rng.permutation(of_label[label])
            shares = rng.dirichlet(np.full(num_clients, alpha))
            cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
            for part, chunk in zip(parts, np.split(rows, cuts), strict=True):
                part.extend(chunk.tolist())
        if all(parts):
            return [np.sort(np.array(part, dtype=np.int64)) for part in parts]
    raise InputError(
        f"partition_alpha: {alpha} left a client without rows in 1,000 draws "
        f"({len(labels)} rows, {num_clients} clients); use a larger one or fewer clients"
    )


def _enough(num_rows: int, num_clients: int) -> None:
    if num_rows < num_clients:
        raise InputError(f"num_clients: {num_clients} clients for {num_rows} rows of data")
