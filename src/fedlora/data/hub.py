"""Reads data sets of the hub, and those that `save_to_disk` of datasets wrote."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from fedlora.data.rows import Rows, without_nan
from fedlora.errors import InputError


def read_hub(name: str, configuration: str | None, split: str) -> Rows:
    """Read a split of a data set of the hub, or of a directory (of files, or by `save_to_disk`).

    A column of class numbers is read as the classes' names.

    Args:
        name: of the hub, or a directory.
        configuration: of the data set; None: its default.
        split: its name; a slice such as `train[:100]` too.

    Raises:
        InputError: it cannot be loaded, or has no such split; the message lists those there are.
    """
    from datasets import get_dataset_split_names, load_dataset

    saved = is_saved(Path(name))
    if saved and configuration is not None:
        raise InputError(
            f"dataset_config: {name} was written by save_to_disk and has no configurations, got "
            f"{configuration!r}; leave it out"
        )
    try:
        loaded = _saved(name, split) if saved else load_dataset(name, configuration, split=split)
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # If the names of the splits cannot be had either, the first error is all there is to say.
        with suppress(Exception):
            splits = [] if saved else get_dataset_split_names(name, configuration)
            if splits and split.partition("[")[0] not in splits:
                why = f"it has {', '.join(splits)}"
        raise InputError(f"dataset_name: {name}: split {split!r} cannot be loaded: {why}") from None
    if not (rows := rows_of(loaded)):
        raise InputError(f"dataset_name: {name}: split {split!r} holds no rows")
    return rows


def rows_of(dataset: Any) -> Rows:
    """The rows of a `datasets.Dataset`, with the names of classes in the place of their numbers.

    NaN becomes None, and so does a class that is missing (None, or a negative number).
    """
    from datasets import ClassLabel

    rows: Rows = dataset.to_list()
    for column, feature in dataset.features.items():
        if isinstance(feature, ClassLabel):
            for row in rows:
                value = row[column]
                row[column] = None if value is None or value < 0 else feature.int2str(value)
    return [without_nan(row) for row in rows]


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` of a Dataset or a DatasetDict made this directory."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(name: str, split: str) -> Any:
    """A split of what `save_to_disk` wrote, as `datasets.load_dataset` would read it.

    A data set that was saved without splits is its own only split, which may be called train.
    """
    from datasets import DatasetDict, ReadInstruction, concatenate_datasets, load_from_disk

    loaded = load_from_disk(name)
    if isinstance(loaded, DatasetDict):
        splits = dict(loaded)
    else:
        splits = {str(loaded.split or "train"): loaded, "train": loaded}
    part = split.partition("[")[0]
    if "+" not in split and part not in splits:
        raise ValueError(f"it has {', '.join(splits)}")
    pieces = ReadInstruction.from_spec(split).to_absolute({k: len(v) for k, v in splits.items()})
    return concatenate_datasets([splits[p.splitname].select(range(p.from_, p.to)) for p in pieces])
