"""The rows that a configuration names, and whose they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.data.raw_data import EMBEDDED_ROWS, RawData, load_rows
from fedlora.embedded import instructions
from fedlora.errors import InputError
from support.rows import rows, write_jsonl


def test_rows_of_files_are_located_in_their_files() -> None:
    raw = RawData([[{"a": 1}], [{"a": 2}, {"a": 3}]], ["x.json", "y.json"], [], "*.json")
    assert raw.train == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [name for name, _ in raw.named_rows(except_of={0})] == ["y.json, row 1", "y.json, row 2"]
    assert raw.row_name(1, 1) == "y.json, row 2"
    assert raw.called(1) == "client 1 (y.json)"


def test_rows_of_one_data_set_are_located_in_it_whoever_has_them() -> None:
    raw = RawData([[{"a": 9}], [{"a": 7}]], ["", ""], [], "all.json", numbers=[[9], [7]])
    assert raw.named_rows() == [("row 7", {"a": 7}), ("row 9", {"a": 9})]
    assert raw.row_name(0, 0) == "all.json, row 9"
    assert raw.called(0) == "client 0"


def test_a_file_is_divided_and_its_evaluation_held_out(tmp_path: Path) -> None:
    everything = rows(40)
    path = write_jsonl(tmp_path / "all.jsonl", everything)
    raw = load_rows(Config(train_file=str(path), num_clients=3, eval_fraction=0.25))
    assert len(raw.eval) == 10
    assert raw.title == "all.jsonl"
    both = [*raw.train, *raw.eval]
    assert sorted(row["prompt"] for row in both) == sorted(row["prompt"] for row in everything)
    assert raw.numbers is not None
    for client, numbers in enumerate(raw.numbers):
        assert raw.clients[client] == [everything[number - 1] for number in numbers]


def test_the_embedded_data_set_is_that_of_the_seed() -> None:
    raw = load_rows(Config(dataset_name="embedded", num_clients=2, seed=7))
    train, held_out = EMBEDDED_ROWS
    assert raw.eval == instructions(held_out, seed=7, split="eval")
    wanted = instructions(train, seed=7, split="train")
    assert sorted(map(str, raw.train)) == sorted(map(str, wanted))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"eval_fraction": 0.001}, "eval_fraction: 0.001 of 20 rows leaves none to evaluate on"),
        ({"eval_fraction": 0.999}, "eval_fraction: 0.999 of 20 rows leaves none to train on"),
        ({"eval_fraction": 0.5, "eval_file": "it"}, "which has rows of its own already"),
        (
            {"num_clients": 3, "partition": "quantity", "partition_shares": [1.0, 1.0]},
            "num_clients: 3, partition_shares: 2: these do not name the same number",
        ),
    ],
)
def test_what_does_not_fit_is_refused(keys: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "all.jsonl", rows(20)))
    if "eval_file" in keys:
        keys = {**keys, "eval_file": path}
    with pytest.raises(InputError, match=says):
        load_rows(Config(train_file=path, **keys))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"partition": "quantity"}, "partition: quantity divides one data set"),
        ({"eval_fraction": 0.1}, "eval_fraction divides one data set"),
        ({"client_ranks": [2, 2, 2]}, r"client_ranks: 3, but .* matches 2 files, one per client"),
    ],
)
def test_files_of_clients_are_divided_already(
    keys: dict[str, Any], says: str, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows(3))
    with pytest.raises(InputError, match=says):
        load_rows(Config(train_file=str(tmp_path / "*.jsonl"), **keys))
