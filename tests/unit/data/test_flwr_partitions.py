"""Partitions of Flower Datasets as clients' files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from fedlora import Config, InputError
from fedlora.data.flwr_partitions import save_partitions
from fedlora.data.raw_data import load_rows

TOPICS = ClassLabel(names=["sea", "sky"])
FORM = Features({"instruction": Value("string"), "output": Value("string"), "topic": TOPICS})


@dataclass
class Partitioner:
    """As `flwr_datasets.partitioner.Partitioner`: parts of one data set, by number."""

    parts: list[Dataset]

    @property
    def num_partitions(self) -> int:
        return len(self.parts)


@dataclass
class Divided:
    """As `flwr_datasets.FederatedDataset`, whose `load_partition` may leave out the only split."""

    partitioners: dict[str, Partitioner]
    asked: list[tuple[int, str | None]] = field(default_factory=list)

    def load_partition(self, partition_id: int, split: str | None = None) -> Any:
        self.asked.append((partition_id, split))
        return self.partitioners[str(split)].parts[partition_id]


def part(*numbers: int) -> Dataset:
    """Rows whose number stands in every column."""
    rows = {
        "instruction": [f"Say {n}" for n in numbers],
        "output": [str(n) for n in numbers],
        "topic": [n % 2 for n in numbers],
    }
    return Dataset.from_dict(rows, features=FORM)


def test_partitions_become_the_clients(tmp_path: Path) -> None:
    parts = [part(5, 2, 9), *(part(n) for n in range(20, 30))]
    divided = Divided({"train": Partitioner(parts)})
    pattern = save_partitions(divided, tmp_path / "parts")
    assert divided.asked == [(k, "train") for k in range(11)]
    raw = load_rows(Config(train_file=pattern))
    outputs = [[row["output"] for row in rows] for rows in raw.clients]
    assert outputs == [["5", "2", "9"], *([str(n)] for n in range(20, 30))]
    assert [row["topic"] for row in raw.clients[0]] == ["sky", "sea", "sky"]
    assert raw.names[10] == "client-10.parquet"


def test_a_split_among_several(tmp_path: Path) -> None:
    divided = Divided({"train": Partitioner([part(1)]), "test": Partitioner([part(2), part(3)])})
    with pytest.raises(InputError, match=r"split: None is not divided.*there are train, test"):
        save_partitions(divided, tmp_path)
    with pytest.raises(InputError, match="split: 'validation' is not divided"):
        save_partitions(divided, tmp_path, "validation")
    save_partitions(divided, tmp_path, "test")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "client-0.parquet",
        "client-1.parquet",
    ]


def test_files_of_an_earlier_division_stay(tmp_path: Path) -> None:
    divided = Divided({"train": Partitioner([part(1)])})
    save_partitions(divided, tmp_path)
    with pytest.raises(InputError, match=r"holds client-\*.parquet already"):
        save_partitions(divided, tmp_path)


def test_an_empty_partition_is_told(tmp_path: Path) -> None:
    divided = Divided({"train": Partitioner([part(1), part()])})
    with pytest.raises(InputError, match="client-1: its partition has no rows"):
        save_partitions(divided, tmp_path)
