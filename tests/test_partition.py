"""The division of one data set among clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import InputError
from fedlora.partition import Indices, dirichlet, iid

law = settings(max_examples=80, deadline=None, derandomize=True)

seeds = st.integers(0, 2**32 - 1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def assert_every_row_once(parts: Sequence[Indices], rows: int, clients: int) -> None:
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows))
    for part in parts:
        assert part.dtype == np.int64
        assert part.tolist() == sorted(part.tolist())
        assert len(part) > 0


@law
@given(st.integers(1, 60), st.integers(1, 60), seeds)
def test_iid_gives_every_row_once_in_even_parts(rows: int, clients: int, seed: int) -> None:
    clients = min(rows, clients)
    parts = iid(rows, clients, rng(seed))
    assert_every_row_once(parts, rows, clients)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@law
@given(
    st.lists(st.sampled_from(["a", "b", "c", 1, 2.5]), min_size=12, max_size=60),
    st.integers(1, 4),
    st.sampled_from([0.3, 1.0, 100.0]),
    seeds,
)
def test_dirichlet_gives_every_row_once(
    labels: list[str | int | float], clients: int, alpha: float, seed: int
) -> None:
    assert_every_row_once(dirichlet(labels, clients, alpha, rng(seed)), len(labels), clients)


Divide = Callable[[np.random.Generator], list[Indices]]
LABELS = [i % 5 for i in range(100)]


@pytest.mark.parametrize(
    "divide",
    [lambda g: iid(100, 4, g), lambda g: dirichlet(LABELS, 4, 0.5, g)],
    ids=["iid", "dirichlet"],
)
def test_a_division_is_that_of_its_seed(divide: Divide) -> None:
    def of(seed: int) -> list[list[int]]:
        return [part.tolist() for part in divide(rng(seed))]

    assert of(1) == of(1)
    assert of(1) != of(2)


def test_iid_is_not_in_the_order_of_rows() -> None:
    parts = iid(100, 4, rng())
    assert all(part.tolist() != list(range(p * 25, p * 25 + 25)) for p, part in enumerate(parts))


def skew(alpha: float) -> float:
    """The mean over clients of the share of a client's most frequent label, of ten."""
    labels = [i % 10 for i in range(2000)]
    found = []
    for seed in range(5):
        for part in dirichlet(labels, 10, alpha, rng(seed)):
            counts = Counter(labels[row] for row in part)
            found.append(max(counts.values()) / len(part))
    return float(np.mean(found))


def test_a_small_alpha_gives_a_client_few_labels_and_a_large_one_all_alike() -> None:
    # One label alone is a share of 1, all alike one of .1.
    small, middle, large = skew(0.1), skew(1.0), skew(1000.0)
    assert small > 0.6
    assert large < 0.15
    assert large < middle < small


def test_a_large_alpha_gives_even_sizes_and_a_small_one_does_not() -> None:
    def sizes(alpha: float) -> list[int]:
        return [len(part) for part in dirichlet(LABELS * 10, 5, alpha, rng(3))]

    assert max(sizes(1e4)) - min(sizes(1e4)) < 40
    assert max(sizes(0.1)) - min(sizes(0.1)) > 100


def test_every_label_is_divided_by_itself() -> None:
    parts = dirichlet(LABELS * 10, 2, 1e6, rng())
    for part in parts:
        counts = Counter(LABELS[row % 100] for row in part)
        assert all(abs(count - 100) <= 2 for count in counts.values())


def test_rows_of_a_label_are_shuffled() -> None:
    first = dirichlet([0] * 100, 2, 1e6, rng())[0]
    assert first.tolist() != list(range(len(first)))


def test_fewer_rows_than_clients_are_refused() -> None:
    with pytest.raises(InputError, match=r"num_clients: 4 clients for 3 rows"):
        iid(3, 4, rng())
    with pytest.raises(InputError, match=r"num_clients: 4 clients for 3 rows"):
        dirichlet([0, 1, 2], 4, 1.0, rng())


def test_a_division_that_leaves_a_client_without_rows_is_refused() -> None:
    # One label, one client gets all of it.
    with pytest.raises(InputError, match=r"partition_alpha: 1e-06.*use a larger one"):
        dirichlet([0] * 20, 5, 1e-6, rng())
