"""Names of Flower Datasets' partitioners in the place of `partition`'s own."""

from __future__ import annotations

import pytest

from fedlora import Config, InputError
from fedlora.config.flower_partitioners import FLOWER_PARTITIONERS, division_named


@pytest.mark.parametrize(("partitioner", "division"), list(FLOWER_PARTITIONERS.items()))
def test_a_partitioner_names_our_division(partitioner: str, division: str) -> None:
    config = Config(partition=partitioner, partition_column="topic")
    assert config.partition == division


@pytest.mark.parametrize("name", ["iid", "labels", "no such", None, 3])
def test_anything_else_is_left_as_it_is(name: object) -> None:
    assert division_named(name) == name


def test_growing_parts_are_shares() -> None:
    with pytest.raises(InputError, match=r"^partition: SquarePartitioner is .*\[1, 4, 9, "):
        Config(partition="SquarePartitioner")


def test_a_partitioner_without_counterpart_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"ShardPartitioner has no counterpart.*save_partitions"):
        Config(partition="ShardPartitioner")
