"""Reads rows from JSON, JSON lines, CSV and Parquet files, and from data sets of the hub."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import zip_longest
from numbers import Number
from pathlib import Path
from typing import Any
from uuid import UUID

from fedlora.errors import InputError

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")


def read_rows(path: str | Path) -> Rows:
    """The rows of a file, by its ending.

    `.json`, `.jsonl` and `.ndjson` hold a JSON list of objects or one object per line, whichever it
    is (both stand under either ending in the wild); `.csv` has a header, its cells are text, empty
    ones and those that say nan None; `.parquet`. NaN is None wherever it stands.

    Raises:
        InputError: the file is missing, empty, malformed (with the line where there is one), or
            not what its ending says.
    """
    path = Path(path)
    if not path.is_file():
        what = f"{path}: no such file" if not path.exists() else f"{path}: is no file"
        if _is_saved(path):
            what += "; what save_to_disk of datasets wrote is given as dataset_name"
        raise InputError(what)
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
    """The rows of a file that is what its ending says."""
    with path.open("rb") as file:
        head = file.read(256)
    kind = _kind(head)
    ending = path.suffix.lower()
    if ending == ".parquet":
        if kind != "Parquet" and head:
            raise InputError(f"{path}: is no Parquet file; it looks like {kind}")
        return _parquet(path)
    if kind not in ("JSON", "text"):
        raise InputError(f"{path}: is {kind}, not what its ending ({path.suffix}) says")
    if ending == ".csv":
        if kind == "JSON" and _is_json(path):
            raise InputError(f"{path}: holds JSON, not CSV; name it .json or .jsonl")
        return _csv(path)
    return _json(path, kind)


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
    return [without_nan(row) for row in rows]


def _json(path: Path, kind: str) -> Rows:
    """The rows of a JSON list, or of one object per line."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    if kind == "text":
        first = text.strip().partition("\n")[0][:60]
        raise InputError(f"{path}, line 1: malformed JSON: {first!r}; CSV files end in .csv")
    if text.lstrip().startswith("["):
        try:
            rows: Rows = loads(text)
            return rows
        except json.JSONDecodeError as error:
            raise _malformed(path, error.lineno, error) from None
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        return [loads(line) for _, line in lines]
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


def loads(text: str) -> Any:
    """JSON as pandas and Python write it, in which NaN stands for a missing value.

    Half of a pair of surrogates, which is no character (a text that was cut within an emoji), is
    U+FFFD: no tokenizer takes it.

    Raises:
        ValueError: it is malformed.
    """
    value = json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))
    return _whole_characters(value) if _SURROGATE.search(text) else value


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _whole_characters(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(inner) for key, inner in value.items()}
    return [_whole_characters(inner) for inner in value] if isinstance(value, list) else value


def _malformed(path: Path, line: int, error: json.JSONDecodeError) -> InputError:
    return InputError(f"{path}, line {line}: malformed JSON: {error.msg}")


_NO_CELL = (None, "", "nan", "NaN", "-nan", "-NaN")


def _csv(path: Path) -> Rows:
    """Cells as text, empty ones None: guessing types would make 7 of "007", nothing of "None".

    What Python, numpy and pandas write for a missing number is None too, as pandas reads it.
    """
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
                    pairs = zip_longest(header, cells)
                    rows.append(
                        {column: None if cell in _NO_CELL else cell for column, cell in pairs}
                    )
                begins = reader.line_num + 1
        except csv.Error as error:
            raise InputError(f"{path}, line {begins}: malformed CSV: {error}") from None
    for column in header:
        if header.count(column) > 1:
            raise InputError(f"{path}, line 1: the header names the column {column!r} twice")
    return rows


def read_hub(name: str, configuration: str | None, split: str) -> Rows:
    """A data set of the hub, or a directory (of files, or made by `save_to_disk`).

    A column of class numbers is read as their names.

    Raises:
        InputError: it cannot be loaded, or has no such split; the message lists those there are.
    """
    from datasets import ClassLabel, get_dataset_split_names, load_dataset

    saved = _is_saved(Path(name))
    if saved and configuration is not None:
        raise InputError(
            f"dataset_config: {name} was written by save_to_disk and has no configurations, got "
            f"{configuration!r}; leave it out"
        )
    try:
        loaded = _saved(name, split) if saved else load_dataset(name, configuration, split=split)
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        # Where the splits cannot be had either, the first error says all there is to say.
        with suppress(Exception):
            splits = [] if saved else get_dataset_split_names(name, configuration)
            if splits and split.partition("[")[0] not in splits:
                why = f"it has {', '.join(splits)}"
        raise InputError(f"dataset_name: {name}: split {split!r} cannot be loaded: {why}") from None
    rows: Rows = loaded.to_list()
    for column, feature in loaded.features.items():
        if isinstance(feature, ClassLabel):
            for row in rows:
                value = row[column]
                row[column] = None if value is None or value < 0 else feature.int2str(value)
    if not rows:
        raise InputError(f"dataset_name: {name}: split {split!r} holds no rows")
    return [without_nan(row) for row in rows]


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` of a Dataset or a DatasetDict made this directory."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(name: str, split: str) -> Any:
    """A split of what `save_to_disk` wrote; a data set without splits is its own only one."""
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


def is_null(value: Any) -> bool:
    """Whether a value is missing: None, or what pandas and numpy have for it."""
    if value is None or isinstance(value, str):
        return value is None
    if isinstance(value, Decimal):
        return value.is_nan()
    if isinstance(value, Number):
        return bool(value != value)
    return type(value).__name__ in ("NaTType", "NAType")


def without_nan(value: Any) -> Any:
    """A value of JSON's or Arrow's kinds, None for NaN wherever it stands in it."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if is_null(value) else value


def is_text(value: Any) -> bool:
    """Whether a value can stand in a text: text, a number, true or false, a date; or nothing."""
    kinds = (str, Number, Decimal, date, time, timedelta, UUID, type(None))
    return isinstance(value, kinds)


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
        if is_null(value):
            continue
        kind = _type(value)
        if first is None:
            first = place, kind, value
        elif kind != first[1]:
            raise InputError(
                f"{what}: the column {column} mixes types: {first[0]} holds {first[1]} "
                f"({_short(first[2])}), {place} {kind} ({_short(value)}); use one type"
            )


def no_text(column: str, value: Any) -> str:
    """What to say of a value that should be text and is none."""
    return (
        f"the column {column} holds {_type(value)} ({_short(value)}); expected text: write it out "
        "in the data, or name other columns with prompt_template and completion_template"
    )


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    names: dict[type, str] = {str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 30 else text[:27] + "..."
