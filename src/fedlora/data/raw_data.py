"""Loads the rows that a configuration names, and divides them among clients."""

from __future__ import annotations

import glob
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.data.division import divide
from fedlora.data.rows import Row, Rows, numbered, read_hub, read_rows
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
        names: what each client's rows are: a file, a value of `partition_column`, or nothing.
        eval: rows of the global evaluation.
        title: what was read, for a heading.
        numbers: of every client's rows, where they stand in the data set that was divided,
            counted from 1; none: every client has a file of its own.
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

    def located(self, but: Container[int] = ()) -> list[tuple[str, Row]]:
        """The clients' rows with where they stand: in the data set, or in a client's own file.

        Args:
            but: clients whose own files are left out.
        """
        if self.numbers is None:
            return [
                (f"{self.names[client]}, {place}", row)
                for client, rows in enumerate(self.clients)
                if client not in but
                for place, row in numbered(rows)
            ]
        pairs = zip(self.numbers, self.clients, strict=True)
        in_order = sorted(
            ((number, row) for of, rows in pairs for number, row in zip(of, rows, strict=True)),
            key=lambda pair: pair[0],
        )
        return [(f"row {number}", row) for number, row in in_order]

    def place(self, client: int, row: int) -> str:
        """Where a client's row stands, for a message."""
        if self.numbers is None:
            return f"{self.names[client]}, row {row + 1}"
        return f"{self.title}, row {self.numbers[client][row]}"

    def called(self, client: int) -> str:
        """A client in a message."""
        return f"client {client}" + (f" ({name})" if (name := self.names[client]) else "")


def load_rows(config: Config) -> RawData:
    """The raw rows of every client, and those of the global evaluation.

    Raises:
        InputError: no data is named, a file or split is missing, or a count does not fit.
    """
    if config.train_file and _is_pattern(config.train_file):
        return _one_file_each(config)
    rows, evaluation, title = _one_data_set(config)
    if config.eval_file:
        evaluation = _rows_of_file("eval_file", config.eval_file)
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
    """Rows that are to be divided among clients, those to evaluate on, and what was read."""
    if config.train_file:
        rows = _rows_of_file("train_file", config.train_file)
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
    """Whether this names several files, rather than one whose name has such a sign in it."""
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
    evaluation = _rows_of_file("eval_file", config.eval_file) if config.eval_file else []
    clients = [_rows_of_file("train_file", path) for path in paths]
    return RawData(clients, [Path(path).name for path in paths], evaluation, Path(pattern).name)


def _rows_of_file(key: str, path: str) -> Rows:
    """The rows of a file; a message about it names the key it came from."""
    try:
        return read_rows(path)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def _num_ranks(client_ranks: int | list[int] | None) -> int | None:
    """How many clients the key `client_ranks` lists; None: it is no list."""
    return len(client_ranks) if isinstance(client_ranks, list) else None


def _number_of_clients(config: Config) -> int | None:
    """How many clients the configuration names; None: it does not say."""
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
    """Numbers of the rows to train on, and of those to evaluate on."""
    order = generator(seed, 0, SERVER, Purpose.EVALUATION).permutation(num_rows)
    number = round(eval_fraction * num_rows)
    if not 0 < number < num_rows:
        raise InputError(
            f"eval_fraction: {eval_fraction} of {num_rows} rows leaves "
            + ("none to evaluate on" if number == 0 else "none to train on")
        )
    out = set(order[:number].tolist())
    return [i for i in range(num_rows) if i not in out], sorted(out)
