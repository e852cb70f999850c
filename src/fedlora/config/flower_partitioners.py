"""Reads the names of Flower Datasets' partitioners as the divisions of rows that do the same."""

from __future__ import annotations

from typing import Any

FLOWER_PARTITIONERS = {
    "IidPartitioner": "iid",
    "DirichletPartitioner": "dirichlet",
    "PathologicalPartitioner": "labels",
    "NaturalIdPartitioner": "column",
    "SizePartitioner": "quantity",
}
"""Partitioner of `flwr_datasets` -> the `partition` that divides as it does."""

_GROWING_SHARES = {
    "LinearPartitioner": "[1, 2, 3, ...]",
    "SquarePartitioner": "[1, 4, 9, ...]",
    "ExponentialPartitioner": "[2.72, 7.39, 20.1, ...]",
}
"""Partitioner whose parts grow with the client -> what has to stand in `partition_shares`."""


def division_named(name: Any) -> Any:
    """The value of `partition`, for which the name of a partitioner may stand.

    Returns:
        Our name of the division; anything but a partitioner's name as it is.

    Raises:
        ValueError: a partitioner whose division has no counterpart by its name alone.
    """
    if not isinstance(name, str) or not name.endswith("Partitioner"):
        return name
    if name in _GROWING_SHARES:
        raise ValueError(
            f"partition: {name} is partition: quantity with partition_shares: "
            f"{_GROWING_SHARES[name]}, a share for each client"
        )
    if name not in FLOWER_PARTITIONERS:
        raise ValueError(
            f"partition: {name} has no counterpart here; fedlora.save_partitions writes the "
            "partitions of a FederatedDataset as files, which train_file takes"
        )
    return FLOWER_PARTITIONERS[name]
