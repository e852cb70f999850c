"""Loads the rows that a configuration names, and divides them among clients."""

from __future__ import annotations

import glob
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.data.division import divide
from fedlora.data.hub import read_hub
from fedlora.data.row_files import read_rows_of
from fedlora.data.rows import Row, Rows, numbered
from fedlora.embedded import EMBEDDED, instructions
from fedlora.errors import InputError
from fedlora.seeds import SERVER, Purpose, generator
from fedlora.text import natural

if TYPE_CHECKING:
    from fedlora.config.config import Config

EMBEDDED_ROWS = (2400, 480)
"""Training rows (all clients together) and held-out rows of the embedded data set."""


@dataclass(frozen=True)
class RawData:
    """Rows as they were read, divided among clients.

    Args:
        clients: each client's rows, in client order.
        names: for each client the file its rows come from, the value of `partition_column` that
            they share, or "".
        eval: rows of the global evaluation; may be empty.
        title: what was read, for a heading.
        numbers: for each client the numbers of its rows in the data set that was divided, counted
            from 1; None: every client has a file of its own.
    """

    clients: list[Rows]
    names: list[str]
    eval: Rows
    title: str
    numbers: list[list[int]] | None = None

    @property
    def train(self) -> Rows:
        """All clients' rows."""
        return [row for rows in self.clients for row in rows]

    def named_rows(self, except_of: Container[int] = ()) -> list[tuple[str, Row]]:
        """`(name, row)` of all clients' rows; the name is for a message, such as `a.csv, row 3`.

        Rows of one data set come in its order, those of clients' files file by file.

        Args:
            except_of: clients whose own files are left out.
        """
        if self.numbers is None:
            return [
                (f"{self.names[client]}, {row_name}", row)
                for client, rows in enumerate(self.clients)
                if client not in except_of
                for row_name, row in numbered(rows)
            ]
        by_number = {
            number: row
            for numbers, rows in zip(self.numbers, self.clients, strict=True)
            for number, row in zip(numbers, rows, strict=True)
        }
        return [(f"row {number}", by_number[number]) for number in sorted(by_number)]

    def row_name(self, client: int, row: int) -> str:
        """What a client's row, counted from 0, is called in a message: its file and number."""
        if self.numbers is None:
            return f"{self.names[client]}, row {row + 1}"
        return f"{self.title}, row {self.numbers[client][row]}"

    def called(self, client: int) -> str:
        """What a client is called in a message: its number, and its name where it has one."""
        return f"client {client}" + (f" ({name})" if (name := self.names[client]) else "")


def load_rows(config: Config) -> RawData:
    """Read the rows that a run is given, and divide them among its clients.

    `train_file` with a pattern is one file per client; any other file or data set is divided by
    `partition`. Rows of the global evaluation come from `eval_file`, from `dataset_test_split`, or
    are drawn from the data set before it is divided (`eval_fraction`).

    Raises:
        InputError: no data is named, a file or split is missing, or a count does not fit.
    """
    if config.train_file and _is_pattern(config.train_file):
        return _one_file_each(config)
    rows, evaluation, title = _one_data_set(config)
    if config.eval_file:
        evaluation = read_rows_of("eval_file", config.eval_file)
    trained_on = list(range(len(rows)))
    if config.eval_fraction:
        if evaluation:
            raise InputError(
                "eval_fraction holds rows out for the evaluation, which has rows of its own "
                "already; leave one of them out"
            )
        trained_on, held_out = _held_out(len(rows), config.eval_fraction, config.seed)
        evaluation = [rows[i] for i in held_out]
    parts, names = divide(config, [rows[i] for i in trained_on], _number_of_clients(config))
    numbers = [[trained_on[i] for i in part] for part in parts]
    return RawData(
        [[rows[i] for i in part] for part in numbers],
        names,
        evaluation,
        title,
        [[i + 1 for i in part] for part in numbers],
    )


def _one_data_set(config: Config) -> tuple[Rows, Rows, str]:
    """The rows to divide among clients, those to evaluate on, and what was read, for a heading."""
    if config.train_file:
        rows = read_rows_of("train_file", config.train_file)
        return rows, [], Path(config.train_file).name
    if config.dataset_name == EMBEDDED:
        train, held_out = EMBEDDED_ROWS
        rows = instructions(train, seed=config.seed, split="train")
        evaluation = instructions(held_out, seed=config.seed, split="eval")
        return rows, evaluation, "embedded instructions"
    if config.dataset_name:
        name = config.dataset_name
        rows = read_hub(name, config.dataset_config, config.dataset_train_split)
        evaluation = []
        if config.dataset_test_split:
            evaluation = read_hub(name, config.dataset_config, config.dataset_test_split)
        return rows, evaluation, name
    raise InputError("no data: give train_file or dataset_name (embedded: the package's own)")


def _is_pattern(path: str) -> bool:
    """Whether a name stands for several files. A file may have `*`, `?` or `[` in its own name."""
    return bool(set(path) & set("*?[")) and not Path(path).exists()


def _one_file_each(config: Config) -> RawData:
    """A client for each file that the pattern in `train_file` matches, in natural order."""
    pattern = str(config.train_file)
    paths = sorted(glob.glob(pattern), key=natural)
    if not paths:
        raise InputError(f"train_file: {pattern}: the pattern matches no file")
    if config.partition != "iid":
        raise InputError(
            f"partition: {config.partition} divides one data set; train_file: {pattern} is one "
            "file per client already"
        )
    if config.eval_fraction:
        raise InputError(
            f"eval_fraction divides one data set; train_file: {pattern} is one file per client: "
            "use client_eval_fraction, or eval_file"
        )
    for key, value in (
        ("num_clients", config.num_clients),
        ("client_ranks", _num_ranks(config.client_ranks)),
    ):
        if value is not None and value != len(paths):
            raise InputError(
                f"{key}: {value}, but train_file: {pattern} matches {len(paths)} files, one per "
                "client"
            )
    evaluation = read_rows_of("eval_file", config.eval_file) if config.eval_file else []
    clients = [read_rows_of("train_file", path) for path in paths]
    return RawData(clients, [Path(path).name for path in paths], evaluation, Path(pattern).name)


def _num_ranks(client_ranks: int | list[int] | str | None) -> int | None:
    """How many clients the key `client_ranks` lists; None: it is not a list."""
    return len(client_ranks) if isinstance(client_ranks, list) else None


def _number_of_clients(config: Config) -> int | None:
    """How many clients the configuration asks for; None: it does not say."""
    counts = {
        "num_clients": config.num_clients,
        "client_ranks": _num_ranks(config.client_ranks),
        "partition_shares": len(config.partition_shares) if config.partition_shares else None,
    }
    numbers = {key: number for key, number in counts.items() if number}
    if len(set(numbers.values())) > 1:
        raise InputError(
            ", ".join(f"{key}: {number}" for key, number in numbers.items())
            + ": these do not name the same number of clients; give one of each for every client"
        )
    return next(iter(numbers.values()), None)


def _held_out(num_rows: int, eval_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Draw the rows to evaluate on: numbers of those to train on, and of those held out."""
    order = generator(seed, 0, SERVER, Purpose.EVALUATION).permutation(num_rows)
    number = round(eval_fraction * num_rows)
    if not 0 < number < num_rows:
        raise InputError(
            f"eval_fraction: {eval_fraction} of {num_rows} rows leaves "
            + ("none to evaluate on" if number == 0 else "none to train on")
        )
    held_out = set(order[:number].tolist())
    return [i for i in range(num_rows) if i not in held_out], sorted(held_out)
