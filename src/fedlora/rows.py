"""Reads rows from JSON, JSON lines, CSV and Parquet files, and from data sets of the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedlora.errors import InputError

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")


def read_rows(path: str | Path) -> Rows:
    """The rows of a file, by its ending.

    `.json`, `.jsonl` and `.ndjson` hold a JSON list of objects or one object per line, whichever it
    is (both stand under either ending in the wild); `.csv` has a header, its cells are text and
    empty ones None; `.parquet`.

    Raises:
        InputError: the file is missing, empty, malformed (with the line where there is one), or
            not what its ending says.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file" if not path.exists() else f"{path}: is no file")
    if path.suffix.lower() not in ENDINGS:
        raise InputError(
            f"{path}: cannot tell what it holds; its name should end in {', '.join(ENDINGS)}"
        )
    try:
        rows = _read(path)
    except InputError:
        raise
    except UnicodeDecodeError:
        line = _first_undecodable(path.read_bytes())
        raise InputError(f"{path}, line {line}: is not UTF-8 text; convert the file") from None
    except Exception as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not rows:
        raise InputError(f"{path}: holds no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: row {number} is no object with columns: {str(row)[:40]!r}")
    return rows


def _read(path: Path) -> Rows:
    with path.open("rb") as file:
        head = file.read(256)
    found = _kind(head)
    ending = path.suffix.lower()
    if ending == ".parquet":
        if found != "Parquet" and head:
            raise InputError(f"{path}: is no Parquet file; it looks like {found}")
        return _parquet(path)
    if found not in ("JSON", "text"):
        raise InputError(f"{path}: is {found}, not what its ending ({path.suffix}) says")
    if ending == ".csv":
        if found == "JSON" and _is_json(path):
            raise InputError(f"{path}: holds JSON, not CSV; name it .json or .jsonl")
        return _csv(path)
    return _json(path, found)


def _first_undecodable(content: bytes) -> int:
    """The line, from 1; a decoder that reads in pieces counts from the piece's start."""
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return content[: error.start].count(b"\n") + 1
    raise AssertionError


def _kind(head: bytes) -> str:
    """What the first bytes of a file look like."""
    for mark, name in (
        (b"PAR1", "Parquet"),
        (b"\x1f\x8b", "compressed (gzip)"),
        (b"PK\x03\x04", "compressed (zip)"),
        (b"\xff\xfe", "UTF-16 text (expected UTF-8)"),
        (b"\xfe\xff", "UTF-16 text (expected UTF-8)"),
        (b"BZh", "compressed (bzip2)"),
        (b"\x28\xb5\x2f\xfd", "compressed (zstd)"),
    ):
        if head.startswith(mark):
            return name
    if b"\0" in head:
        return "binary"
    return "JSON" if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[") else "text"


def _is_json(path: Path) -> bool:
    text = path.read_text(encoding="utf-8-sig").strip()
    for part in (text, text.partition("\n")[0]):
        try:
            json.loads(part)
            return True
        except ValueError:
            continue
    return False


def _parquet(path: Path) -> Rows:
    from pyarrow import parquet

    rows: Rows = parquet.ParquetFile(path).read().to_pylist()
    return rows


def _json(path: Path, found: str) -> Rows:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    if found == "text":
        first = text.strip().partition("\n")[0][:60]
        raise InputError(f"{path}, line 1: malformed JSON: {first!r}; CSV files end in .csv")
    if text.lstrip().startswith("["):
        try:
            rows: Rows = json.loads(text)
            return rows
        except json.JSONDecodeError as error:
            raise _malformed(path, error.lineno, error) from None
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        return [json.loads(line) for _, line in lines]
    except json.JSONDecodeError:
        pass
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        for number, line in lines:
            try:
                json.loads(line)
            except json.JSONDecodeError as error:
                raise _malformed(path, number, error) from None
    raise InputError(
        f"{path}: holds one JSON object with {', '.join(list(whole)[:5])}; expected a list of "
        "rows, or one object per line"
    )


def _malformed(path: Path, line: int, error: json.JSONDecodeError) -> InputError:
    return InputError(f"{path}, line {line}: malformed JSON: {error.msg}")


def _csv(path: Path) -> Rows:
    """Cells as text, empty ones None: guessing types would make 7 of "007", nothing of "None"."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        csv.field_size_limit(2**31 - 1)  # documents are longer than the 131,072 characters it has
        reader = csv.reader(file, strict=True)
        header: list[str] = []
        rows: Rows = []
        begins = 1  # the line at which the row begins that is being read
        try:
            for cells in reader:
                if not header:
                    header = cells
                elif len(cells) > len(header):
                    raise InputError(
                        f"{path}, line {begins}: row {len(rows) + 1} has more cells than the header"
                    )
                elif cells:
                    found = zip_longest(header, cells)
                    rows.append({column: cell or None for column, cell in found})
                begins = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{path}, line {begins}: malformed CSV: {error}") from None
    for column in header:
        if header.count(column) > 1:
            raise InputError(f"{path}, line 1: the header names the column {column!r} twice")
    return rows


def read_hub(name: str, configuration: str | None, split: str) -> Rows:
    """A data set of the hub (or a directory), a column of class numbers as their names.

    Raises:
        InputError: it cannot be loaded, or has no such split; the message lists those there are.
    """
    from datasets import ClassLabel, get_dataset_split_names, load_dataset

    try:
        found = load_dataset(name, configuration, split=split)
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # Where the splits cannot be had either, the first error says all there is to say.
        with suppress(Exception):
            splits = get_dataset_split_names(name, configuration)
            if split.partition("[")[0] not in splits:
                why = f"it has {', '.join(splits)}"
        raise InputError(f"dataset_name: {name}: split {split!r} cannot be loaded: {why}") from None
    rows: Rows = found.to_list()
    for column, feature in found.features.items():
        if isinstance(feature, ClassLabel):
            for row in rows:
                value = row[column]
                row[column] = None if value is None or value < 0 else feature.int2str(value)
    if not rows:
        raise InputError(f"dataset_name: {name}: split {split!r} holds no rows")
    return rows


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns that any row has, in the order of their first appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def numbered(rows: Sequence[Row]) -> list[tuple[str, Row]]:
    """Rows with what they are called in a message, counted from 1."""
    return [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def check_column(rows: Sequence[tuple[str, Row]], column: str, what: str) -> None:
    """Refuse a column whose values are of several types.

    Args:
        rows: with what each is called.
        column: in all of them, or in some.
        what: the data, for the message.

    Raises:
        InputError: the rows that differ.
    """
    first: tuple[str, str, Any] | None = None
    for place, row in rows:
        value = row.get(column)
        if value is None:
            continue
        kind = _type(value)
        if first is None:
            first = place, kind, value
        elif kind != first[1]:
            raise InputError(
                f"{what}: the column {column} mixes types: {first[0]} holds {first[1]} "
                f"({_short(first[2])}), {place} {kind} ({_short(value)}); use one type"
            )


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 30 else text[:27] + "..."
