"""Writes the partitions of Flower Datasets as files, one for each client."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from fedlora.data.hub import rows_of
from fedlora.errors import InputError


class FederatedDataset(Protocol):
    """What is used of `flwr_datasets.FederatedDataset`."""

    @property
    def partitioners(self) -> dict[str, Any]:
        """Split -> its partitioner, which has `num_partitions`."""

    def load_partition(self, partition_id: int, split: str | None = None) -> Any:
        """The `datasets.Dataset` of a partition, counted from 0."""


def save_partitions(
    federated_dataset: FederatedDataset, directory: str | Path, split: str | None = None
) -> str:
    """Write every partition of a federated data set of Flower as a file of its own.

    The rows are those of `federated_dataset.load_partition(0)`, `load_partition(1)` and so on, in
    their order, whatever the partitioner is. A column of class numbers is written as the classes'
    names. Partition 12 becomes `directory/client-12.parquet`; it belongs to client 12.

    Args:
        federated_dataset: a `flwr_datasets.FederatedDataset`, or what has its `partitioners` and
            `load_partition`. That package need not be installed.
        directory: made where it is missing.
        split: whose partitions are written; None: that of the only partitioner.

    Returns:
        The pattern of all these files, for the key `train_file`.

    Raises:
        InputError: several splits are divided and none is named, the split is not divided, a
            partition has no rows, or the directory holds files of this name already.
    """
    partitioners = federated_dataset.partitioners
    if split is None and len(partitioners) == 1:
        split = next(iter(partitioners))
    if split is None or split not in partitioners:
        raise InputError(
            f"split: {split!r} is not divided among clients; there are {', '.join(partitioners)}"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.glob("client-*.parquet")):
        raise InputError(f"{directory} holds client-*.parquet already; give another directory")
    for partition in range(partitioners[split].num_partitions):
        _save(
            rows_of(federated_dataset.load_partition(partition, split)),
            directory / f"client-{partition}.parquet",
        )
    return str(directory / "client-*.parquet")


def _save(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as Parquet, which keeps their types.

    Raises:
        InputError: there are none.
    """
    from datasets import Dataset

    if not rows:
        raise InputError(f"{path.stem}: its partition has no rows; a client needs at least one")
    Dataset.from_list(rows).to_parquet(str(path))
