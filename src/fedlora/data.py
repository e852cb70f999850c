"""Data: loaded, divided among clients, turned into text by a template, tokenised.

A tokenised row is `{"input_ids": [...], "labels": [...]}`, as transformers' Trainer takes it;
labels are -100 where no loss is taken.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.demo import EMBEDDED, instructions
from fedlora.errors import InputError
from fedlora.partition import dirichlet, iid
from fedlora.seeds import SERVER, Purpose, generator

if TYPE_CHECKING:
    from fedlora.config import Config

Row = Mapping[str, Any]
Tokens = Mapping[str, list[int]]
IGNORE = -100
"""The label of a token no loss is taken on (PyTorch's and transformers' convention)."""

EMBEDDED_ROWS = (2400, 480)
"""Training rows (all clients together) and held-out rows of the embedded data set."""


@dataclass(frozen=True)
class Template:
    """How a row becomes a prompt and a completion.

    Args:
        name: what `template:` says.
        columns: each entry is a tuple of alternatives, one of which a row must have.
        render: `row -> (prompt, completion)`.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    render: Callable[[Row], tuple[str, str]]


def _first(row: Row, *names: str) -> str:
    return next((str(row[name]) for name in names if row.get(name) is not None), "")


def _alpaca(row: Row) -> tuple[str, str]:
    context = _first(row, "input", "context").strip()
    if context:
        lead = (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
        )
        middle = f"### Instruction:\n{row['instruction']}\n\n### Input:\n{context}"
    else:
        lead = (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n"
        )
        middle = f"### Instruction:\n{row['instruction']}"
    return f"{lead}{middle}\n\n### Response:\n", _first(row, "output", "response")


TEMPLATES = {
    t.name: t
    for t in (
        Template("alpaca", (("instruction",), ("output", "response")), _alpaca),
        Template(
            "prompt_completion",
            (("prompt",), ("completion",)),
            lambda row: (str(row["prompt"]), str(row["completion"])),
        ),
        Template("text", (("text",),), lambda row: ("", str(row["text"]))),
    )
}


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
        dropped: rows left out because truncation left no token to learn from.
        fingerprint: of all tokens, to recognise other data on resume.
    """

    clients: tuple[ClientData, ...]
    eval: Sequence[Tokens]
    template: str
    dropped: int
    fingerprint: str


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON list, JSON lines, CSV or Parquet file.

    Raises:
        InputError: the file is missing, empty or malformed (with the line where there is one).
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows: list[dict[str, Any]]
    try:
        if path.suffix == ".csv":
            rows = _csv(path)
        elif path.suffix == ".parquet":
            from datasets import Dataset

            rows = Dataset.from_parquet(str(path), keep_in_memory=True).to_list()
        else:
            text = path.read_text(encoding="utf-8-sig")
            if text.lstrip().startswith("["):
                rows = json.loads(text)
            else:
                rows = [
                    _line(path, number, line)
                    for number, line in enumerate(text.split("\n"), 1)
                    if line.strip()
                ]
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: malformed JSON: {error.msg}") from None
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not rows:
        raise InputError(f"{path}: holds no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is no object with columns: {str(row)[:40]!r}")
    return rows


def _csv(path: Path) -> list[dict[str, Any]]:
    """Cells as text, empty ones None: guessing types would make 7 of "007", nothing of "None"."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, strict=True))
    for number, row in enumerate(rows, 1):
        if None in row:
            raise InputError(f"{path}: row {number} has more cells than the header")
    return [{column: cell or None for column, cell in row.items()} for row in rows]


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: malformed JSON: {error.msg}") from None


def _hub(config: Config, split: str) -> list[dict[str, Any]]:
    from datasets import load_dataset

    assert config.dataset_name is not None
    try:
        found = load_dataset(config.dataset_name, config.dataset_config, split=split)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"dataset_name: {config.dataset_name}: split {split!r} cannot be loaded: {lines[0]}"
        ) from None
    rows: list[dict[str, Any]] = found.to_list()
    return rows


def load_rows(config: Config) -> tuple[list[list[dict[str, Any]]], list[dict[str, Any]]]:
    """The raw rows of every client, and those of the global evaluation.

    Raises:
        InputError: no data is named, a file or split is missing, or a count does not fit.
    """
    evaluation: list[dict[str, Any]] = []
    one_each = False  # a file per client
    if config.train_file:
        one_each = (
            bool(set(config.train_file) & set("*?[")) and not Path(config.train_file).exists()
        )
        if one_each:
            paths = sorted(glob.glob(config.train_file), key=_natural)
            if not paths:
                raise InputError(f"train_file: {config.train_file}: the pattern matches no file")
            parts = [_named("train_file", path) for path in paths]
        else:
            parts = [_named("train_file", config.train_file)]
    elif config.dataset_name == EMBEDDED:
        train, held_out = EMBEDDED_ROWS
        parts = [instructions(train, seed=config.seed, split="train")]
        evaluation = instructions(held_out, seed=config.seed, split="eval")
    elif config.dataset_name:
        parts = [_hub(config, config.dataset_train_split)]
        if config.dataset_test_split:
            evaluation = _hub(config, config.dataset_test_split)
    else:
        raise InputError("no data: give train_file or dataset_name (embedded: the package's own)")
    if config.eval_file:
        evaluation = _named("eval_file", config.eval_file)
    number = len(config.client_ranks) if isinstance(config.client_ranks, list) else None
    if one_each:
        if config.partition != "iid":
            raise InputError(
                f"partition: {config.partition} divides one data set; train_file: "
                f"{config.train_file} is one file per client already"
            )
        for key, value in (("num_clients", config.num_clients), ("client_ranks", number)):
            if value is not None and value != len(parts):
                raise InputError(
                    f"{key}: {value}, but train_file: {config.train_file} matches {len(parts)} "
                    "files, one per client"
                )
        return parts, evaluation
    if config.num_clients and number and number != config.num_clients:
        raise InputError(
            f"client_ranks: {number} ranks for num_clients: {config.num_clients}; give one for each"
        )
    clients = config.num_clients or number or 10
    return _divide(config, parts[0], clients), evaluation


def _named(key: str, path: str) -> list[dict[str, Any]]:
    """The rows of a file; a message about it names the key it came from."""
    try:
        return read_rows(path)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def _natural(path: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def _divide(config: Config, rows: list[dict[str, Any]], clients: int) -> list[list[dict[str, Any]]]:
    rng = generator(config.seed, 0, SERVER, Purpose.PARTITION)
    if config.partition == "dirichlet":
        column = str(config.partition_column)
        if any(column not in row for row in rows):
            raise InputError(
                f"partition_column: {column!r} is not a column; there are {', '.join(rows[0])}"
            )
        parts = dirichlet([row[column] for row in rows], clients, config.partition_alpha, rng)
    else:
        parts = iid(len(rows), clients, rng)
    return [[rows[i] for i in part] for part in parts]


def choose_template(name: str, columns: Sequence[str]) -> Template:
    """The template of that name, or ("auto") the first whose columns are there.

    Raises:
        InputError: a column is missing; the message lists those present.
    """

    def missing(template: Template) -> list[str]:
        return [" or ".join(c) for c in template.columns if not set(c) & set(columns)]

    if name != "auto":
        if absent := missing(TEMPLATES[name]):
            raise InputError(
                f"template: {name} needs the column {', '.join(absent)}; the data has "
                f"{', '.join(columns)}"
            )
        return TEMPLATES[name]
    for template in TEMPLATES.values():
        if not missing(template):
            return template
    raise InputError(
        f"template: no template fits the columns {', '.join(columns)}; known are "
        + "; ".join(
            f"{t.name} ({', '.join(' or '.join(c) for c in t.columns)})" for t in TEMPLATES.values()
        )
    )


def tokenize(
    row: Row, template: Template, tokenizer: Any, max_length: int, completion_only: bool
) -> dict[str, list[int]] | None:
    """One row as tokens: the prompt, the completion, the end-of-text token, cut to `max_length`.

    Returns:
        None where no token is left to learn from.
    """
    prompt, completion = template.render(row)
    before = tokenizer(prompt)["input_ids"] if prompt else []
    ids = list(tokenizer(prompt + completion)["input_ids"])
    if before and before[-1] == tokenizer.eos_token_id:  # tokenizers that end every text with it
        before = before[:-1]
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    ids = ids[:max_length]
    masked = min(len(before), len(ids)) if completion_only else 0
    labels = [IGNORE] * masked + ids[masked:]
    # The first token of a text is predicted from nothing, so it never counts.
    if all(label == IGNORE for label in labels[1:]):
        return None
    return {"input_ids": ids, "labels": labels}


def load_data(config: Config, tokenizer: Any) -> FederatedData:
    """Everything above in one: the tokenised data of every client and of the evaluation.

    Raises:
        InputError: data that cannot be used, with what was found and what to do.
    """
    raw, evaluation = load_rows(config)
    template = choose_template(config.template, list(raw[0][0]))
    dropped = 0

    def tokenized(rows: Sequence[Row], limit: int | None, what: str) -> list[Tokens]:
        nonlocal dropped
        for row in rows:
            for column in template.columns:
                if all(row.get(name) is None for name in column):
                    raise InputError(
                        f"{what}: a row has no {' or '.join(column)}: {str(dict(row))[:80]}"
                    )
        found = [
            tokenize(row, template, tokenizer, config.max_length, config.completion_only_loss)
            for row in rows[:limit]
        ]
        kept: list[Tokens] = [tokens for tokens in found if tokens]
        dropped += len(found) - len(kept)
        if found and not kept:
            raise InputError(
                f"{what}: all {len(found)} rows lose their last token to learn from when cut to "
                f"max_length: {config.max_length}; use a larger one"
            )
        return kept

    parts = []
    for client, rows in enumerate(raw):
        kept = tokenized(rows, config.max_train_samples, f"client {client}")
        order = generator(config.seed, 0, client, Purpose.HOLDOUT).permutation(len(kept))
        held = round(config.client_eval_fraction * len(kept))
        out = set(order[:held].tolist())
        parts.append(
            ClientData(
                train=[row for i, row in enumerate(kept) if i not in out],
                eval=[kept[i] for i in sorted(out)],
            )
        )
    if not any(part.train for part in parts):
        raise InputError("no client has a row to train on; lower client_eval_fraction")
    held_out = tokenized(evaluation, config.max_eval_samples, "the evaluation data")
    if not evaluation:
        # In turn, so that a limit takes some of every client's rows.
        turns = zip_longest(*(part.eval for part in parts))
        held_out = [row for turn in turns for row in turn if row][: config.max_eval_samples]
    return FederatedData(
        tuple(parts), held_out, template.name, dropped, _fingerprint(parts, held_out)
    )


def _fingerprint(parts: Sequence[ClientData], held_out: Sequence[Tokens]) -> str:
    digest = hashlib.sha256()
    for rows in [*(r for part in parts for r in (part.train, part.eval)), held_out]:
        digest.update(b"|")
        for row in rows:
            digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()
