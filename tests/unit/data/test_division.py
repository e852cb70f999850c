"""The rows of one data set divided among clients as the configuration says."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.data.division import divide
from fedlora.errors import InputError

ROWS = [{"text": str(i), "kind": "abc"[i % 3]} for i in range(60)]


@pytest.mark.parametrize(
    "keys",
    [
        {"partition": "iid"},
        {"partition": "dirichlet", "partition_column": "kind", "partition_alpha": 1.0},
        {"partition": "labels", "partition_column": "kind", "partition_labels_per_client": 2},
        {"partition": "quantity", "partition_alpha": 1.0},
        {"partition": "quantity", "partition_shares": [3.0, 2.0, 1.0]},
        {"partition": "column", "partition_column": "kind"},
    ],
)
def test_every_row_is_one_clients(keys: dict[str, Any]) -> None:
    parts, names = divide(Config(**keys), ROWS, 3)
    assert sorted(i for part in parts for i in part) == list(range(60))
    assert len(parts) == len(names) == 3


def test_each_way_divides_as_its_name_says() -> None:
    def kinds(**keys: Any) -> list[set[str]]:
        parts, _ = divide(Config(partition_column="kind", **keys), ROWS, 3)
        return [{ROWS[i]["kind"] for i in part} for part in parts]

    assert kinds(partition="column") == [{"a"}, {"b"}, {"c"}]
    assert all(len(of) <= 2 for of in kinds(partition="labels", partition_labels_per_client=2))
    shares = Config(partition="quantity", partition_shares=[3.0, 2.0, 1.0])
    assert [len(part) for part in divide(shares, ROWS, 3)[0]] == [30, 20, 10]


def test_a_client_for_each_value_is_named_by_it() -> None:
    config = Config(partition="column", partition_column="kind")
    assert divide(config, ROWS, None)[1] == ["a", "b", "c"]
    assert divide(Config(), ROWS, None)[1] == [""] * 10  # ten where nothing says how many


def test_the_label_column_divides_where_no_other_is_named() -> None:
    by_label = Config(partition="dirichlet", label_column_name="kind", partition_alpha=1.0)
    by_column = Config(partition="dirichlet", partition_column="kind", partition_alpha=1.0)
    one, other = (divide(config, ROWS, 3)[0] for config in (by_label, by_column))
    assert [list(part) for part in one] == [list(part) for part in other]


@pytest.mark.parametrize(
    ("keys", "clients", "says"),
    [
        ({"partition_column": "sort"}, None, "partition_column: 'sort' is not a column; there are"),
        ({"label_column_name": "sort"}, None, "label_column_name: 'sort' is not a column"),
        ({"partition_column": "kind"}, 4, "num_clients: 4, but partition: column makes a client"),
        (
            {"partition_column": "kind", "partition_min_size": 21},
            None,
            "partition_min_size: 21, but kind 'a' has fewer rows",
        ),
    ],
)
def test_counts_and_columns_that_do_not_fit(
    keys: dict[str, Any], clients: int | None, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        divide(Config(partition="column", **keys), ROWS, clients)


def test_a_row_without_a_value_is_named() -> None:
    config = Config(partition="column", partition_column="kind")
    with pytest.raises(InputError, match="partition_column: row 61 has no kind"):
        divide(config, [*ROWS, {"text": "x", "kind": None}], None)
