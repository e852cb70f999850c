"""Reads the rows of a single site, which has those of no other client."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.data.hub import read_hub
from fedlora.data.raw_data import RawData
from fedlora.data.row_files import read_rows_of
from fedlora.data.rows import Rows
from fedlora.embedded import EMBEDDED
from fedlora.errors import InputError
from fedlora.text import natural

if TYPE_CHECKING:
    from fedlora.config.config import Config


def load_site_rows(config: Config, client: int, num_clients: int) -> RawData:
    """Read the rows of one client; the other clients have none in the result.

    A pattern in `train_file` may match the site's own file alone, or those of all clients, of which
    the site's is then taken by its number.

    Args:
        config: of the site, with absolute paths.
        client: its number, counted from 0.
        num_clients: how many clients there are. The client keeps its number among them, for random
            draws depend on it.

    Raises:
        InputError: no data is named, it cannot be read, or a key divides data among clients, which
            makes no sense for the rows of one.
    """
    _refuse_dividing(config.partition, config.eval_fraction)
    rows, name = _own_rows(config, client, num_clients)
    clients: list[Rows] = [[] for _ in range(num_clients)]
    names = [""] * num_clients
    clients[client], names[client] = rows, name
    return RawData(clients, names, _evaluation_rows(config), name)


def _refuse_dividing(partition: str, eval_fraction: float) -> None:
    """Refuse keys that divide one data set."""
    if partition != "iid":
        raise InputError(
            f"partition: {partition} divides one data set; a site has its own rows already: "
            "leave it out"
        )
    if eval_fraction:
        raise InputError(
            "eval_fraction divides one data set; a site has its own rows already: use "
            "client_eval_fraction, or eval_file"
        )


def _own_rows(config: Config, client: int, num_clients: int) -> tuple[Rows, str]:
    """The site's rows to train on, and what they are called."""
    if config.train_file:
        path = _own_file(config.train_file, client, num_clients)
        return read_rows_of("train_file", path), Path(path).name
    if config.dataset_name and config.dataset_name != EMBEDDED:
        split = config.dataset_train_split
        return read_hub(config.dataset_name, config.dataset_config, split), config.dataset_name
    raise InputError("no data: give the site's own rows as train_file or dataset_name")


def _own_file(train_file: str, client: int, num_clients: int) -> str:
    """The site's file: the one named, the only one a pattern matches, or its own by its number."""
    if Path(train_file).exists() or not set(train_file) & set("*?["):
        return train_file
    paths = sorted(glob.glob(train_file), key=natural)
    if len(paths) == 1:
        return paths[0]
    if len(paths) == num_clients:
        return paths[client]
    raise InputError(
        f"train_file: {train_file} matches {len(paths) or 'no'} files; at a site it has to match "
        f"its own file alone, or one for each of {num_clients} clients"
    )


def _evaluation_rows(config: Config) -> Rows:
    """The rows that the site evaluates the global model on; empty where none are named."""
    if config.eval_file:
        return read_rows_of("eval_file", config.eval_file)
    if config.dataset_name and config.dataset_test_split and not config.train_file:
        return read_hub(config.dataset_name, config.dataset_config, config.dataset_test_split)
    return []
