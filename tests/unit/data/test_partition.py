"""The division of one data set among clients."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedlora import Config
from fedlora.data.datasets import load_data
from fedlora.data.partition import Indices, by_column, dirichlet, few_labels, iid, quantity
from fedlora.data.raw_data import RawData, load_rows
from fedlora.errors import InputError
from fedlora.text import natural
from support.rows import rows, write_jsonl

law = settings(max_examples=40, deadline=None, derandomize=True)


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
    [
        lambda g: iid(100, 4, g),
        lambda g: dirichlet(LABELS, 4, 0.5, g),
        lambda g: quantity(100, 4, 0.5, g),
        lambda g: quantity(100, 4, 0.5, g, shares=[4, 3, 2, 1]),
        lambda g: few_labels(LABELS, 4, 2, g),
    ],
    ids=["iid", "dirichlet", "quantity", "shares", "labels"],
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


@law
@given(
    st.integers(1, 80),
    st.integers(1, 8),
    st.integers(0, 4),
    st.sampled_from([0.5, 1.0, 100.0]),
    seeds,
)
def test_quantity_gives_every_row_once(
    rows: int, clients: int, least: int, alpha: float, seed: int
) -> None:
    assume(rows >= 3 * clients * max(least, 1))
    parts = quantity(rows, clients, alpha, rng(seed), max(least, 1))
    assert_every_row_once(parts, rows, clients)
    assert min(map(len, parts)) >= least


@law
@given(st.lists(st.floats(0.5, 20), min_size=1, max_size=8), st.integers(200, 500), seeds)
def test_quantity_follows_the_shares(shares: list[float], rows: int, seed: int) -> None:
    parts = quantity(rows, len(shares), 0.5, rng(seed), shares=shares)
    assert_every_row_once(parts, rows, len(shares))
    for part, share in zip(parts, shares, strict=True):
        assert abs(len(part) - rows * share / sum(shares)) <= 1


@st.composite
def dealt(draw: st.DrawFn) -> tuple[list[Any], int, int]:
    """Labels with at least a row for each client, a number of clients, labels for each."""
    names = draw(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=6, unique=True))
    clients = draw(st.integers(1, 8))
    least = -(-len(names) // clients)
    per_client = draw(st.integers(least, len(names)))
    labels = [name for name in names for _ in range(draw(st.integers(clients, clients + 9)))]
    return draw(st.permutations(labels)), clients, per_client


@law
@given(dealt(), seeds)
def test_few_labels_gives_each_client_so_many_labels(
    case: tuple[list[Any], int, int], seed: int
) -> None:
    labels, clients, per_client = case
    parts = few_labels(labels, clients, per_client, rng(seed))
    assert_every_row_once(parts, len(labels), clients)
    held = [Counter(labels[row] for row in part) for part in parts]
    assert [len(counts) for counts in held] == [per_client] * clients
    for_label = {name: [c[name] for c in held if name in c] for name in set(labels)}
    holders = [len(sizes) for sizes in for_label.values()]
    assert max(holders) - min(holders) <= 1
    for sizes in for_label.values():
        assert max(sizes) - min(sizes) <= 1


@law
@given(st.lists(st.sampled_from(["x9", "x10", "y", 7, None]), min_size=1, max_size=40))
def test_by_column_gives_each_value_to_one_client(values: list[Any]) -> None:
    parts, names = by_column(values)
    assert_every_row_once(parts, len(values), len({str(value) for value in values}))
    for part, name in zip(parts, names, strict=True):
        assert {str(values[row]) for row in part} == {name}


def test_by_column_is_in_natural_order() -> None:
    values = ["site_10", "site_9", "site_1", "site_9", "a", "site_2b10", "site_2b9"]
    parts, names = by_column(values)
    assert names == ["a", "site_1", "site_2b9", "site_2b10", "site_9", "site_10"]
    assert [part.tolist() for part in parts] == [[4], [2], [6], [5], [1, 3], [0]]
    assert by_column([10, 9, 1])[1] == ["1", "9", "10"]


@given(st.lists(st.text(max_size=6), max_size=8))
def test_any_texts_have_a_natural_order(texts: list[str]) -> None:
    """Keys begin with text, numbers and texts in turn: they can all be compared."""
    ordered = sorted(texts, key=natural)
    assert Counter(ordered) == Counter(texts)
    assert sorted(["2", "10", "a", ""], key=natural) == ["", "2", "10", "a"]


@pytest.mark.parametrize("least", [1, 5, 20])
@pytest.mark.parametrize("seed", range(10))
def test_no_client_has_fewer_rows_than_asked_for(least: int, seed: int) -> None:
    for parts in (
        iid(200, 8, rng(seed), least),
        dirichlet(LABELS * 2, 8, 5.0, rng(seed), least),
        quantity(200, 8, 10.0, rng(seed), least),
        few_labels(LABELS * 2, 8, 2, rng(seed), least),
    ):
        assert_every_row_once(parts, 200, 8)
        assert min(map(len, parts)) >= least


def test_draws_are_repeated_until_every_client_has_enough() -> None:
    """A first draw leaves some client with less than five rows, for most seeds."""

    def short(least: int) -> int:
        found = (quantity(60, 4, 0.5, rng(seed), least) for seed in range(50))
        return sum(min(map(len, parts)) < 5 for parts in found)

    assert short(0) > 25
    assert short(5) == 0


def close(found: float, wanted: float, variance: float, draws: int) -> bool:
    """Within four standard errors of a mean over so many draws."""
    return abs(found - wanted) < 4 * (variance / draws) ** 0.5


def distance(one: Any, other: Any) -> float:
    """Of Kolmogorov and Smirnov: the largest difference of two samples' distribution functions."""
    at = np.sort(np.concatenate([one, other]))
    ranks = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (one, other)]
    return float(np.abs(ranks[0] - ranks[1]).max())


def whole_rows(shares: Any, size: int) -> Any:
    """Shares as multiples of one of `size` rows, their ends rounded."""
    ends = np.round(np.cumsum(shares, axis=-1) * size)
    return np.diff(ends, axis=-1, prepend=0) / size


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_shares_of_a_label_are_those_of_a_dirichlet_distribution(alpha: float) -> None:
    clients, draws, size = 4, 300, 1000
    labels = [name for name in "ab" for _ in range(size)]
    shares = (
        np.array(
            [
                [
                    [np.count_nonzero((part >= k * size) & (part < (k + 1) * size)) for k in (0, 1)]
                    for part in dirichlet(labels, clients, alpha, rng(seed), 0)
                ]
                for seed in range(draws)
            ]
        )
        / size
    )  # (draw, client, label)
    assert shares.sum(1) == pytest.approx(1.0)
    total = clients * alpha
    mean = 1 / clients
    variance = mean * (1 - mean) / (total + 1)
    covariance = -(mean**2) / (total + 1)
    theirs = np.random.default_rng(99).dirichlet([alpha] * clients, size=20_000)
    theirs = whole_rows(theirs, size)
    assert theirs[:, 0].var() == pytest.approx(variance, rel=0.05)
    for label in (0, 1):
        for client in range(clients):
            own = shares[:, client, label]
            assert close(own.mean(), mean, variance, draws)
            # 1.95 sqrt(1/n + 1/m) is exceeded once in a thousand.
            assert distance(own, theirs[:, client]) < 1.95 * (1 / draws + 1 / 20_000) ** 0.5
        assert shares[:, :, label].var() == pytest.approx(variance, rel=0.15)
        for one, other in ((0, 1), (1, 2), (0, 3)):
            found = np.cov(shares[:, one, label], shares[:, other, label])[0, 1]
            assert found == pytest.approx(covariance, abs=4 * variance / draws**0.5)
    between = np.corrcoef(shares[:, 0, 0], shares[:, 0, 1])[0, 1]
    assert abs(between) < 4 / draws**0.5, "one label's shares tell nothing of another's"


def test_one_alpha_gives_a_label_to_one_client_and_another_to_all_alike() -> None:
    labels = [0] * 1000

    def largest(alpha: float) -> float:
        draws = (dirichlet(labels, 5, alpha, rng(seed), 0) for seed in range(100))
        return float(np.mean([max(map(len, parts)) for parts in draws])) / 1000

    shares = [largest(alpha) for alpha in (0.001, 0.1, 1.0, 10.0, 1000.0)]
    assert shares[0] > 0.98
    assert shares[-1] < 0.23
    assert all(more > less for more, less in pairwise(shares))


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_quantities_are_those_of_a_dirichlet_distribution(alpha: float) -> None:
    clients, draws, size = 5, 500, 2000
    sizes = np.array(
        [[len(p) for p in quantity(size, clients, alpha, rng(seed), 0)] for seed in range(draws)]
    )
    assert (sizes.sum(1) == size).all()
    shares, mean = sizes / size, 1 / clients
    variance = mean * (1 - mean) / (clients * alpha + 1)
    theirs = np.random.default_rng(98).dirichlet([alpha] * clients, size=20_000)
    theirs = whole_rows(theirs, size)
    for client in range(clients):
        assert close(shares[:, client].mean(), mean, variance, draws)
        limit = 1.95 * (1 / draws + 1 / 20_000) ** 0.5
        assert distance(shares[:, client], theirs[:, client]) < limit
    assert shares.var() == pytest.approx(variance, rel=0.15)


def test_shares_decide_the_sizes_exactly() -> None:
    def sizes(rows: int, shares: list[float]) -> list[int]:
        return [len(part) for part in quantity(rows, len(shares), 1.0, rng(5), shares=shares)]

    assert sizes(100, [4, 3, 2, 1]) == [40, 30, 20, 10]
    assert sizes(100, [0.4, 0.3, 0.2, 0.1]) == [40, 30, 20, 10]
    assert sizes(10, [1, 1, 1]) == [3, 4, 3]
    assert sizes(7, [100]) == [7]


Chance = Callable[[int], list[Indices]]


@pytest.mark.parametrize(
    "divide",
    [
        lambda seed: iid(40, 4, rng(seed)),
        lambda seed: quantity(40, 4, 1.0, rng(seed), shares=[1, 1, 1, 1]),
        lambda seed: few_labels([0] * 20 + [1] * 20, 4, 1, rng(seed)),
        lambda seed: dirichlet([0] * 20 + [1] * 20, 4, 1e7, rng(seed)),
    ],
    ids=["iid", "quantity", "labels", "dirichlet"],
)
def test_any_row_may_be_at_any_client(divide: Chance) -> None:
    draws = 600
    counts = np.zeros((4, 40))
    for seed in range(draws):
        for client, part in enumerate(divide(seed)):
            counts[client, part] += 1
    # 160 means of a Bernoulli(1/4); five standard errors.
    assert np.abs(counts / draws - 0.25).max() < 5 * (0.25 * 0.75 / draws) ** 0.5


def test_any_client_may_hold_any_labels() -> None:
    labels, draws = [i % 4 for i in range(48)], 600
    pairs: Counter[tuple[int, ...]] = Counter()
    for seed in range(draws):
        parts = few_labels(labels, 6, 2, rng(seed))
        pairs[tuple(sorted({labels[row] for row in parts[0]}))] += 1
    assert len(pairs) == 6
    assert max(abs(n / draws - 1 / 6) for n in pairs.values()) < 5 * (5 / 36 / draws) ** 0.5


def test_a_label_with_fewer_rows_than_holders_leaves_some_without() -> None:
    """Where a label has one row and two holders, the other has its other label alone."""
    labels = ["rare", *["a"] * 20, *["b"] * 20]
    parts = few_labels(labels, 3, 2, rng(1))
    assert_every_row_once(parts, 41, 3)
    assert sorted(len({labels[row] for row in part}) for part in parts) in ([1, 2, 2], [2, 2, 2])
    assert sum("rare" in {labels[row] for row in part} for part in parts) == 1


def test_labels_are_compared_as_text() -> None:
    """A division is the same for 1 in JSON and "1" in CSV, whichever label stands first."""
    numbers = [i % 5 for i in range(60)]
    texts = [str(i) for i in numbers]
    for one, other in (
        (dirichlet(numbers, 3, 0.5, rng(4)), dirichlet(texts, 3, 0.5, rng(4))),
        (few_labels(numbers, 3, 2, rng(4)), few_labels(texts, 3, 2, rng(4))),
        (by_column(numbers)[0], by_column(texts)[0]),
    ):
        assert [part.tolist() for part in one] == [part.tolist() for part in other]


def digest(parts: Sequence[Indices]) -> str:
    """SHA-256 of the row numbers as little-endian 64-bit integers, a bar after every client."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.astype("<i8").tobytes() + b"|")
    return found.hexdigest()


@pytest.mark.parametrize(
    ("divide", "wanted"),
    [
        (
            lambda g: iid(100, 7, g),
            "1a111ae8fcd0e119397e4810c3e7194d8dac3568010dff47992b959cf37f425b",
        ),
        (
            lambda g: dirichlet(LABELS, 4, 0.5, g),
            "b6ad297cb071e928a6b51d60b0c623cbeca670673b882283a8be22d5ea15c541",
        ),
        (
            lambda g: quantity(100, 4, 0.5, g),
            "8e1bc2cb948b7e7bc36f0ab998374555995fa385397e8423d9e6d814c556ad2a",
        ),
        (
            lambda g: quantity(100, 4, 0.5, g, 1, [4, 3, 2, 1]),
            "612dbd480fabd21a4476a9ab55907c37d9da8ce603c366a571de2cfce76439c8",
        ),
        (
            lambda g: few_labels(LABELS, 4, 2, g),
            "a19f287c1e1d7c282bff72c4879668ccc79f86788e38fa4c7e8849f08796a121",
        ),
    ],
    ids=["iid", "dirichlet", "quantity", "shares", "labels"],
)
def test_a_division_is_the_same_on_any_machine(divide: Divide, wanted: str) -> None:
    assert digest(divide(rng(1))) == wanted


@pytest.mark.parametrize(
    ("divide", "says"),
    [
        (lambda: iid(3, 4, rng()), "num_clients: 4 clients for 3 rows of data"),
        (lambda: quantity(3, 4, 1.0, rng()), "num_clients: 4 clients for 3 rows of data"),
        (lambda: few_labels([0, 1], 3, 2, rng()), "num_clients: 3 clients for 2 rows of data"),
        (
            lambda: iid(7, 4, rng(), 2),
            "num_clients: 4 clients and partition_min_size 2 for 7 rows of data",
        ),
        (
            lambda: dirichlet([0] * 7, 4, 1.0, rng(), 2),
            "num_clients: 4 clients and partition_min_size 2 for 7 rows of data",
        ),
        (
            lambda: dirichlet([0] * 30, 3, 1e-6, rng(), 2),
            "partition_alpha: 1e-06 left a client with fewer than 2 rows (partition_min_size) in "
            "1,000 draws (30 rows, 3 clients); use a larger one or fewer clients",
        ),
        (
            lambda: quantity(30, 3, 1e-6, rng()),
            "partition_alpha: 1e-06 left a client with fewer than 1 rows (partition_min_size) in "
            "1,000 draws (30 rows, 3 clients); use a larger one or fewer clients",
        ),
        (
            lambda: quantity(30, 3, 1.0, rng(), shares=[1, 2]),
            "partition_shares: 2 shares for 3 clients; give one for each",
        ),
        (
            lambda: quantity(30, 3, 1.0, rng(), 2, [1, 1000, 1000]),
            "partition_shares: the smallest client would have 0 of 30 rows, partition_min_size is "
            "2",
        ),
        (
            lambda: few_labels([0, 1, 2], 2, 4, rng()),
            "partition_labels_per_client: 4, but there are 3 different values",
        ),
        (
            lambda: few_labels([0, 1, 2, 0, 1, 2], 2, 1, rng()),
            "partition_labels_per_client: 2 clients of 1 labels leave some of the 3 to nobody; use "
            "more",
        ),
        (
            lambda: few_labels(["a"] * 2 + ["b"] * 20, 4, 1, rng(), 2),
            "partition_labels_per_client: 1 left a client with fewer than 2 rows "
            "(partition_min_size) in 1,000 draws (22 rows, 4 clients); use a larger one or fewer "
            "clients",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused(divide: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError) as raised:
        divide()
    assert str(raised.value) == says


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """60 rows: `number` 0 to 59, three kinds, six sites of natural names."""
    values = [
        {"text": f"row {i:02}", "kind": "abc"[i % 3], "site": f"s{i % 6 + 6}"} for i in range(60)
    ]
    return write_jsonl(tmp_path / "all.jsonl", values)


def loaded(path: Path, **values: Any) -> RawData:
    return load_rows(Config(**{"train_file": str(path), "num_clients": 4, **values}))


def texts(raw: RawData) -> list[list[str]]:
    return [[row["text"] for row in own] for own in raw.clients]


BY_KIND = {"partition_column": "kind"}


@pytest.mark.parametrize(
    "values",
    [
        {"partition": "iid"},
        {"partition": "dirichlet", **BY_KIND},
        {"partition": "labels", **BY_KIND},
        {"partition": "quantity"},
        {"partition": "quantity", "partition_shares": [4, 3, 2, 1]},
        {"partition": "column", "partition_column": "site", "num_clients": None},
    ],
    ids=["iid", "dirichlet", "labels", "quantity", "shares", "column"],
)
def test_every_partition_loses_no_row_and_is_that_of_its_seed(
    table: Path, values: dict[str, Any]
) -> None:
    raw = loaded(table, **values)
    assert sorted(text for own in texts(raw) for text in own) == [f"row {i:02}" for i in range(60)]
    assert texts(loaded(table, **values)) == texts(raw)
    if values["partition"] != "column":
        assert texts(loaded(table, **values, seed=7)) != texts(raw)
        assert raw.names == [""] * 4
    assert len(raw.train) == 60


def test_the_division_of_a_run_is_the_same_on_any_machine(table: Path) -> None:
    found = {}
    for kind in ("iid", "dirichlet", "labels", "quantity"):
        parts = texts(loaded(table, partition=kind, **BY_KIND))
        text = "|".join(",".join(own) for own in parts)
        found[kind] = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert found == GOLDEN


GOLDEN = {
    "iid": "1738fff1b8d4d7f3",
    "dirichlet": "c764185678ea495a",
    "labels": "c7694edfa3d2d705",
    "quantity": "252bebe97488b908",
}


def test_shares_say_how_many_clients_there_are(table: Path) -> None:
    raw = loaded(table, partition="quantity", partition_shares=[3, 2, 1], num_clients=None)
    assert [len(own) for own in raw.clients] == [30, 20, 10]
    with pytest.raises(
        InputError,
        match="num_clients: 5, partition_shares: 3: these do not name the same number of clients",
    ):
        loaded(table, partition="quantity", partition_shares=[3, 2, 1], num_clients=5)
    with pytest.raises(InputError, match="client_ranks: 2, partition_shares: 3: these do not"):
        loaded(
            table,
            partition="quantity",
            partition_shares=[3, 2, 1],
            num_clients=None,
            client_ranks=[1, 2],
        )


def test_a_column_makes_and_names_the_clients(table: Path) -> None:
    values = {"partition": "column", "partition_column": "site"}
    raw = loaded(table, **values, num_clients=None)
    assert raw.names == ["s6", "s7", "s8", "s9", "s10", "s11"]
    for own, name in zip(raw.clients, raw.names, strict=True):
        assert {row["site"] for row in own} == {name}
        assert len(own) == 10
    assert raw.called(4) == "client 4 (s10)"
    assert loaded(table, **values, num_clients=6).names == raw.names
    with pytest.raises(InputError) as raised:
        loaded(table, **values, num_clients=5)
    assert str(raised.value) == (
        "num_clients: 5, but partition: column makes a client of each of the 6 values of site; "
        "leave num_clients out"
    )
    with pytest.raises(InputError, match="partition_min_size: 11, but site 's6' has fewer rows"):
        loaded(table, **values, num_clients=None, partition_min_size=11)


def test_a_list_of_ranks_has_one_for_every_value_of_the_column(table: Path) -> None:
    values = {"partition": "column", "partition_column": "kind", "num_clients": None}
    assert len(loaded(table, **values, client_ranks=[4, 2, 1]).clients) == 3
    with pytest.raises(
        InputError, match="2, but partition: column makes a client of each of the 3"
    ):
        loaded(table, **values, client_ranks=[4, 2])


def test_labels_are_dealt_by_the_column(table: Path) -> None:
    raw = loaded(table, partition="labels", partition_labels_per_client=1, **BY_KIND, num_clients=3)
    assert sorted(len({row["kind"] for row in own}) for own in raw.clients) == [1, 1, 1]
    assert [len(own) for own in raw.clients] == [20, 20, 20]
    with pytest.raises(InputError, match="partition_labels_per_client: 4, but there are 3 differ"):
        loaded(table, partition="labels", partition_labels_per_client=4, **BY_KIND)


def test_every_client_has_the_fewest_rows_asked_for(table: Path) -> None:
    def fewest(least: int) -> int:
        values = {"partition": "quantity", "partition_alpha": 0.6, "partition_min_size": least}
        return min(len(own) for own in loaded(table, **values).clients)

    assert fewest(1) < 9
    assert fewest(9) >= 9
    with pytest.raises(
        InputError, match="num_clients: 4 clients and partition_min_size 16 for 60 rows of data"
    ):
        loaded(table, partition_min_size=16)
    with pytest.raises(
        InputError, match="partition_shares: the smallest client would have 6 of 60"
    ):
        loaded(table, partition="quantity", partition_shares=[4, 3, 2, 1], partition_min_size=7)


@pytest.mark.parametrize("kind", ["dirichlet", "column", "labels"])
def test_what_is_wrong_with_the_column_divided_by(kind: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", rows(8))
    values = {"partition": kind, "num_clients": None}
    with pytest.raises(InputError) as raised:
        Config(train_file=str(path), **values)
    assert str(raised.value) == (
        f"partition: {kind} needs partition_column, the column to divide by"
    )
    there = "there are prompt, completion, kind"
    with pytest.raises(InputError, match=f"^partition_column: 'topic' is not a column; {there}$"):
        loaded(path, **values, partition_column="topic")
    with pytest.raises(InputError, match=f"^label_column_name: 'topic' is not a column; {there}$"):
        loaded(path, **values, label_column_name="topic")
    write_jsonl(path, [*rows(8), {"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError, match=r"^partition_column: row 9 has no kind$"):
        loaded(path, **values, partition_column="kind")
    write_jsonl(path, [{"text": "a", "kind": 1}, {"text": "b"}, {"text": "c", "kind": "two"}])
    with pytest.raises(InputError) as raised:
        loaded(path, **values, partition_column="kind")
    assert str(raised.value) == (
        "the training data: the column kind mixes types: row 1 holds a number (1), row 3 text "
        "('two'); use one type"
    )


def test_the_label_is_what_is_divided_by_without_a_column(table: Path) -> None:
    by_label = loaded(
        table, partition="dirichlet", label_column_name="kind", text_column_names="text"
    )
    assert texts(by_label) == texts(loaded(table, partition="dirichlet", **BY_KIND))


def test_shares_belong_to_quantities() -> None:
    with pytest.raises(InputError, match=r"^partition_shares belongs to partition: quantity$"):
        Config(partition_shares=[1, 2])
    for shares in ([1, 0], [1, -1], []):
        with pytest.raises(InputError, match=r"^partition_shares: \[.*\] must be positive$"):
            Config(partition="quantity", partition_shares=shares)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("partition", "random", "partition: 'random': expected iid, dirichlet, column, labels or"),
        ("partition_alpha", 0, "partition_alpha: 0 must be greater than 0"),
        ("partition_alpha", float("inf"), "partition_alpha: inf must be a finite number"),
        ("partition_labels_per_client", 0, "partition_labels_per_client: 0 must be at least 1"),
        ("partition_min_size", 0, "partition_min_size: 0 must be at least 1"),
        ("eval_fraction", 1, "eval_fraction: 1 must be less than 1"),
        ("eval_fraction", -0.1, "eval_fraction: -0.1 must be at least 0"),
    ],
)
def test_impossible_values(key: str, value: Any, says: str) -> None:
    with pytest.raises(InputError) as raised:
        Config(**{key: value})
    assert str(raised.value).startswith(says)


def test_a_share_of_the_data_set_is_held_out(table: Path) -> None:
    raw = loaded(table, eval_fraction=0.2)
    assert len(raw.eval) == 12
    held = [row["text"] for row in raw.eval]
    trained = [text for own in texts(raw) for text in own]
    assert sorted([*held, *trained]) == [f"row {i:02}" for i in range(60)]
    assert held == sorted(held), "in the order of the file"
    assert held != [f"row {i:02}" for i in range(12)]
    again, other = loaded(table, eval_fraction=0.2), loaded(table, eval_fraction=0.2, seed=1)
    assert (again.eval, again.clients) == (raw.eval, raw.clients)
    assert other.eval != raw.eval
    sized = loaded(table, eval_fraction=0.2, num_clients=7, partition="dirichlet", **BY_KIND)
    assert sized.eval == raw.eval, "whatever is divided afterwards"


def test_a_row_is_held_out_by_chance(table: Path) -> None:
    counts: Counter[str] = Counter()
    for seed in range(200):
        counts.update(row["text"] for row in loaded(table, eval_fraction=0.5, seed=seed).eval)
    assert len(counts) == 60
    assert max(abs(n / 200 - 0.5) for n in counts.values()) < 5 * (0.25 / 200) ** 0.5


@pytest.mark.parametrize(
    ("share", "says"),
    [
        (0.001, "eval_fraction: 0.001 of 60 rows leaves none to evaluate on"),
        (0.999, "eval_fraction: 0.999 of 60 rows leaves none to train on"),
    ],
)
def test_a_share_that_leaves_nothing_is_refused(table: Path, share: float, says: str) -> None:
    with pytest.raises(InputError) as raised:
        loaded(table, eval_fraction=share)
    assert str(raised.value) == says


def test_a_share_is_not_held_out_beside_other_evaluation_data(table: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "e.jsonl", [{"text": "held out"}])
    own = (
        {"eval_file": str(tmp_path / "e.jsonl")},
        {"train_file": None, "dataset_name": "embedded"},
    )
    for values in own:
        with pytest.raises(
            InputError, match=r"eval_fraction holds rows out .* has rows of its own"
        ):
            loaded(table, eval_fraction=0.2, **values)


def test_a_share_of_files_per_client_is_refused(site_files: Path) -> None:
    with pytest.raises(
        InputError, match=r"eval_fraction divides one data set; .*: use client_eval"
    ):
        loaded(site_files / "site_*.jsonl", eval_fraction=0.2)
    with pytest.raises(
        InputError, match=r"partition: quantity divides one data set; .* is one file"
    ):
        loaded(site_files / "site_*.jsonl", partition="quantity")


def test_both_shares_are_held_out(table: Path, tokenizer: Any) -> None:
    config = Config(
        train_file=str(table), num_clients=4, eval_fraction=0.2, client_eval_fraction=0.25
    )
    data = load_data(config, tokenizer)
    assert [len(part.train) for part in data.clients] == [9, 9, 9, 9]
    assert [len(part.eval) for part in data.clients] == [3, 3, 3, 3]
    groups = [data.eval, *(x for part in data.clients for x in (part.train, part.eval))]
    seen = [tuple(row["input_ids"]) for group in groups for row in group]
    assert len(seen) == len(set(seen)) == 60
    assert len(data.eval) == 12, "the held-out share, not what clients held out"


@pytest.mark.parametrize(("share", "held"), [(0.0, 0), (0.1, 1), (0.5, 5), (0.96, 10)])
def test_a_share_of_a_client_is_rounded(
    table: Path, tokenizer: Any, share: float, held: int
) -> None:
    config = Config(train_file=str(table), num_clients=6, client_eval_fraction=share)
    if held == 10:
        with pytest.raises(InputError, match="no client has a row to train on; lower client_eval"):
            load_data(config, tokenizer)
        return
    data = load_data(config, tokenizer)
    assert [len(part.eval) for part in data.clients] == [held] * 6
    assert [len(part.train) for part in data.clients] == [10 - held] * 6


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    """A token per character."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)
