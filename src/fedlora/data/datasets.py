"""Loads the data, divides it among the clients, and turns it into tokens."""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.data.notes import alike, all_dropped, kept, left_out, reasons, unused
from fedlora.data.partition import Indices, by_column, dirichlet, few_labels, iid, quantity
from fedlora.data.rows import (
    Row,
    Rows,
    check_column,
    columns_of,
    is_null,
    numbered,
    read_hub,
    read_rows,
)
from fedlora.data.subsets import in_turn, subsets
from fedlora.data.templates import Rendered, Template, choose_template, classification, label_of
from fedlora.data.token_cache import tokens_of
from fedlora.data.tokenize import Tokens, render
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
        what: what was read, for a heading.
        numbers: of every client's rows, where they stand in the data set that was divided,
            counted from 1; none: every client has a file of its own.
    """

    clients: list[Rows]
    names: list[str]
    eval: Rows
    what: str
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
        found = sorted(
            ((number, row) for of, rows in pairs for number, row in zip(of, rows, strict=True)),
            key=lambda pair: pair[0],
        )
        return [(f"row {number}", row) for number, row in found]

    def place(self, client: int, row: int) -> str:
        """Where a client's row stands, for a message."""
        if self.numbers is None:
            return f"{self.names[client]}, row {row + 1}"
        return f"{self.what}, row {self.numbers[client][row]}"

    def called(self, client: int) -> str:
        """A client in a message."""
        return f"client {client}" + (f" ({name})" if (name := self.names[client]) else "")


@dataclass(frozen=True)
class ClientData:
    """One client's tokenised rows."""

    train: Sequence[Tokens]
    eval: Sequence[Tokens] = ()


@dataclass(frozen=True)
class FederatedData:
    """All clients' data and what the global model is evaluated on.

    Args:
        clients: in client order.
        eval: held-out rows of the global evaluation; empty: none is made.
        template: the template used.
        dropped: why rows were left out -> how many.
        fingerprint: of all tokens, to recognise other data on resume.
        label_names: a classifier's labels in the order of their ids.
        taken: how many rows of how many were drawn and which columns are not, in words.
        notes: what the user should be warned of.
    """

    clients: tuple[ClientData, ...]
    eval: Sequence[Tokens]
    template: str
    dropped: Mapping[str, int]
    fingerprint: str
    label_names: tuple[str, ...] = field(default=())
    taken: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


# --- who holds which rows ---


def load_rows(config: Config) -> RawData:
    """The raw rows of every client, and those of the global evaluation.

    Raises:
        InputError: no data is named, a file or split is missing, or a count does not fit.
    """
    evaluation: Rows = []
    if config.train_file:
        if _is_pattern(config.train_file):
            return _one_file_each(config)
        rows, what = _named("train_file", config.train_file), Path(config.train_file).name
    elif config.dataset_name == EMBEDDED:
        train, held_out = EMBEDDED_ROWS
        rows, what = instructions(train, seed=config.seed, split="train"), "embedded instructions"
        evaluation = instructions(held_out, seed=config.seed, split="eval")
    elif config.dataset_name:
        what = config.dataset_name
        rows = read_hub(what, config.dataset_config, config.dataset_train_split)
        if config.dataset_test_split:
            evaluation = read_hub(what, config.dataset_config, config.dataset_test_split)
    else:
        raise InputError("no data: give train_file or dataset_name (embedded: the package's own)")
    if config.eval_file:
        evaluation = _named("eval_file", config.eval_file)
    numbers = list(range(1, len(rows) + 1))
    if config.eval_fraction:
        if evaluation:
            raise InputError(
                "eval_fraction holds rows out for the evaluation, which has rows of its own "
                "already; leave one of them out"
            )
        kept, out = _held_out(config, len(rows))
        evaluation = [rows[i] for i in out]
        rows, numbers = [rows[i] for i in kept], [numbers[i] for i in kept]
    parts, names = _divide(config, rows, _number_of_clients(config))
    return RawData(
        [[rows[i] for i in part] for part in parts],
        names,
        evaluation,
        what,
        [[numbers[i] for i in part] for part in parts],
    )


def _is_pattern(path: str) -> bool:
    return bool(set(path) & set("*?[")) and not Path(path).exists()


def _one_file_each(config: Config) -> RawData:
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
    for key, value in (("num_clients", config.num_clients), ("client_ranks", _ranks(config))):
        if value is not None and value != len(paths):
            raise InputError(
                f"{key}: {value}, but train_file: {pattern} matches {len(paths)} files, one per "
                "client"
            )
    evaluation = _named("eval_file", config.eval_file) if config.eval_file else []
    clients = [_named("train_file", path) for path in paths]
    return RawData(clients, [Path(path).name for path in paths], evaluation, Path(pattern).name)


def _named(key: str, path: str) -> Rows:
    """The rows of a file; a message about it names the key it came from."""
    try:
        return read_rows(path)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def _ranks(config: Config) -> int | None:
    return len(config.client_ranks) if isinstance(config.client_ranks, list) else None


def _number_of_clients(config: Config) -> int | None:
    given = {
        "num_clients": config.num_clients,
        "client_ranks": _ranks(config),
        "partition_shares": len(config.partition_shares) if config.partition_shares else None,
    }
    found = {key: number for key, number in given.items() if number}
    if len(set(found.values())) > 1:
        raise InputError(
            ", ".join(f"{key}: {number}" for key, number in found.items())
            + ": these do not name the same number of clients; give one of each for every client"
        )
    return next(iter(found.values()), None)


def _held_out(config: Config, rows: int) -> tuple[list[int], list[int]]:
    """The rows to train on and those to evaluate on."""
    order = generator(config.seed, 0, SERVER, Purpose.EVALUATION).permutation(rows)
    number = round(config.eval_fraction * rows)
    if not 0 < number < rows:
        raise InputError(
            f"eval_fraction: {config.eval_fraction} of {rows} rows leaves "
            + ("none to evaluate on" if number == 0 else "none to train on")
        )
    out = set(order[:number].tolist())
    return [i for i in range(rows) if i not in out], sorted(out)


def _divide(config: Config, rows: Rows, clients: int | None) -> tuple[list[Indices], list[str]]:
    rng = generator(config.seed, 0, SERVER, Purpose.PARTITION)
    number, least = clients or 10, config.partition_min_size
    values: list[Any] = []
    if config.partition in ("dirichlet", "column", "labels"):
        column = str(config.partition_column or config.label_column_name)
        key = "partition_column" if config.partition_column else "label_column_name"
        if column not in (columns := columns_of(rows)):
            raise InputError(f"{key}: {column!r} is not a column; there are {', '.join(columns)}")
        check_column(numbered(rows), column, "the training data")
        values = [row.get(column) for row in rows]
        if None in values:
            raise InputError(f"{key}: row {values.index(None) + 1} has no {column}")
    if config.partition == "column":
        parts, names = by_column(values)
        if clients is not None and clients != len(parts):
            raise InputError(
                f"num_clients: {clients}, but partition: column makes a client of each of the "
                f"{len(parts)} values of {column}; leave num_clients out"
            )
        short = [name for name, part in zip(names, parts, strict=True) if len(part) < least]
        if short:
            raise InputError(
                f"partition_min_size: {least}, but {column} {short[0]!r} has fewer rows"
            )
        return parts, names
    if config.partition == "dirichlet":
        parts = dirichlet(values, number, config.partition_alpha, rng, least)
    elif config.partition == "labels":
        parts = few_labels(values, number, config.partition_labels_per_client, rng, least)
    elif config.partition == "quantity":
        alpha, shares = config.partition_alpha, config.partition_shares
        parts = quantity(len(rows), number, alpha, rng, least, shares)
    else:
        parts = iid(len(rows), number, rng, least)
    return parts, [""] * number


# --- how rows are read ---


def is_classification(config: Config) -> bool:
    """Whether the data and the settings alone say that a classifier is trained."""
    return (
        config.lora_task_type == "SEQ_CLS"
        or config.label_column_name is not None
        or config.template == "classification"
    )


def template_of(config: Config, raw: RawData, classify: bool) -> Template:
    """The template, checked against the columns of the training and the evaluation data.

    Raises:
        InputError: a column is missing, has several types, or is empty in a row.
    """
    columns = columns_of(raw.train)
    if classify:
        template = classification(config.text_column_names, config.label_column_name, columns)
    else:
        template = choose_template(
            config.template,
            columns,
            prompt_template=config.prompt_template,
            completion_template=config.completion_template,
        )
    if raw.eval and (absent := template.missing(there := columns_of(raw.eval))):
        raise InputError(
            f"the evaluation data: template {template.name} needs the column {', '.join(absent)}; "
            f"it has {', '.join(there)}"
        )
    used = [*(name for names in template.columns for name in names), *template.optional]
    in_use = raw.located(without_column(raw, template))
    both = ((in_use, "the training data"), (numbered(raw.eval), "the evaluation data"))
    for located, what in both:
        for place, row in located:
            for names in template.columns:
                if all(is_null(row.get(name)) for name in names):
                    raise InputError(
                        f"{what}: {place} has no {' or '.join(names)}: {str(dict(row))[:80]}"
                    )
        for name in used:
            check_column(located, name, what)
    return template


def without_column(raw: RawData, template: Template) -> dict[int, str]:
    """Clients whose own file holds a column that the template needs in none of its rows, and why.

    One such row among others is a mistake in a file, and refused; a whole file of them is a
    client that cannot take part, as one whose rows are all too long.
    """
    if raw.numbers is not None:
        return {}
    found = {}
    for client, rows in enumerate(raw.clients):
        for names in template.columns:
            if rows and all(is_null(row.get(name)) for row in rows for name in names):
                found[client] = f"it has no {' or '.join(names)}"
    return found


def _rendered(place: str, row: Row, template: Template, empty: str = "") -> Rendered | str:
    """A row as its template reads it, or why it is dropped; a complaint names the row."""
    try:
        return empty or render(row, template)
    except InputError as error:
        raise InputError(f"{place}: {error}") from None


def find_labels(config: Config, raw: RawData, template: Template) -> list[str]:
    """All labels, in natural order, or as `label_names` has them.

    Raises:
        InputError: only one value, one for almost every row, or one that `label_names` lacks.
    """
    column = template.columns[-1][0]
    found = Counter(label_of(row, column) for _, row in raw.located(without_column(raw, template)))
    everything = found + Counter(label_of(row, column) for row in raw.eval)
    if len(found) < 2:
        raise InputError(
            f"label_column_name: {column} has one value ({next(iter(found))}) in all "
            f"{sum(found.values())} training rows; a classifier needs two"
        )
    if len(found) > 100 and len(found) > sum(found.values()) / 2:
        raise InputError(
            f"label_column_name: {column} has {len(found)} different values in "
            f"{sum(found.values())} rows; these are no classes"
        )
    if config.label_names is None:
        return sorted(everything, key=natural)
    if unknown := sorted(set(everything) - set(config.label_names)):
        raise InputError(
            f"label_names: the data has labels that are not among them: {', '.join(unknown)}"
        )
    return list(config.label_names)


# --- all together ---


def load_data(
    config: Config,
    tokenizer: Any,
    raw: RawData | None = None,
    *,
    classify: bool = False,
    label_names: Sequence[str] = (),
) -> FederatedData:
    """The tokenised data of every client and of the evaluation.

    Args:
        config: of the run.
        tokenizer: of transformers.
        raw: rows that were read already.
        classify: make texts and labels for a classifier.
        label_names: its labels in the order of their ids; none: `find_labels`.

    Raises:
        InputError: data that cannot be used, with what was found and what to do.
    """
    raw = raw or load_rows(config)
    classify = classify or is_classification(config)
    template = template_of(config, raw, classify)
    if classify and not label_names:
        label_names = find_labels(config, raw, template)
    taken = subsets(config, [len(rows) for rows in raw.clients], len(raw.eval))
    empty = without_column(raw, template)
    wanted = [
        _rendered(raw.place(client, i), raw.clients[client][i], template, empty.get(client, ""))
        for client, rows in enumerate(taken.clients)
        for i in rows
    ]
    where = Path(config.eval_file).name if config.eval_file else f"{raw.what}, evaluation"
    wanted += [_rendered(f"{where}, row {i + 1}", raw.eval[i], template) for i in taken.eval]
    # All at once: what is kept of them serves every division of the same rows.
    found = iter(
        tokens_of(
            wanted,
            tokenizer,
            config.max_length,
            config.completion_only_loss,
            label_names,
            config.num_threads,
        )
    )
    *of_clients, of_eval = [list(islice(found, len(rows))) for rows in (*taken.clients, taken.eval)]
    parts, useless = [], {}
    for client, outcomes in enumerate(of_clients):
        rows = kept(outcomes)
        if why := all_dropped(outcomes):
            useless[client] = why
        order = generator(config.seed, 0, client, Purpose.HOLDOUT).permutation(len(rows))
        held = round(config.client_eval_fraction * len(rows))
        out = set(order[:held].tolist())
        parts.append(
            ClientData(
                train=[row for i, row in enumerate(rows) if i not in out],
                eval=[rows[i] for i in sorted(out)],
            )
        )
    notes = left_out(raw, useless, config.strict_clients)
    if not any(part.train for part in parts):
        raise InputError("no client has a row to train on; lower client_eval_fraction")
    if why := all_dropped(of_eval):
        raise InputError(f"the evaluation data: {why}")
    held_out, said = kept(of_eval), taken.said
    if not raw.eval:
        held_out, more = in_turn(config, [part.eval for part in parts])
        said += more
    notes += [
        f"client {client} has no rows and takes no part"
        for client, part in enumerate(parts)
        if not part.train and client not in useless
    ]
    notes += alike(label_names)
    said = (*said, *unused(config, raw, template))
    return FederatedData(
        tuple(parts),
        held_out,
        template.name,
        dict(reasons(chain(*of_clients, of_eval))),
        _fingerprint(parts, held_out),
        tuple(label_names),
        said,
        tuple(notes),
    )


def _fingerprint(parts: Sequence[ClientData], held_out: Sequence[Tokens]) -> str:
    digest = hashlib.sha256()
    for rows in [*(r for part in parts for r in (part.train, part.eval)), held_out]:
        digest.update(b"|")
        for row in rows:
            digest.update(json.dumps(list(row.values())).encode())
    return digest.hexdigest()
