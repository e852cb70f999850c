"""Reads rows from JSON, JSON lines, CSV and Parquet files."""

from __future__ import annotations

import csv
import json
from itertools import zip_longest
from pathlib import Path

from fedlora.data.hub import is_saved
from fedlora.data.json_text import loads
from fedlora.data.rows import Rows, without_nan
from fedlora.errors import InputError

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")


def read_rows(path: str | Path) -> Rows:
    """Read the rows of a file in the format that its ending names.

    - `.json`, `.jsonl`, `.ndjson`: a JSON list of objects, or one object per line. Either may stand
      under each of these endings, since published files mix them up.
    - `.csv`: the first line names the columns. Cells are text; an empty cell is None, and so is one
      that says nan.
    - `.parquet`.

    NaN becomes None wherever it stands.

    Returns:
        At least one row; each is column -> value.

    Raises:
        InputError: the file is missing, empty, malformed (with the line where there is one), or
            not what its ending says.
    """
    path = Path(path)
    if not path.is_file():
        complaint = f"{path}: no such file" if not path.exists() else f"{path}: is no file"
        if is_saved(path):
            complaint += "; what save_to_disk of datasets wrote is given as dataset_name"
        raise InputError(complaint)
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


def read_rows_of(key: str, path: str | Path) -> Rows:
    """`read_rows` of the file that a configuration key names; a complaint begins with the key."""
    try:
        return read_rows(path)
    except InputError as error:
        raise InputError(f"{key}: {error}") from None


def _read(path: Path) -> Rows:
    """The rows of a file, whose first bytes have to agree with its ending."""
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
    """The number, from 1, of the first line that is not UTF-8.

    The whole content is decoded once more for this: the error of a decoder that reads a file in
    pieces counts bytes from the beginning of its piece.
    """
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
    """Whether a file, or its first line, is JSON."""
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


def _malformed(path: Path, line: int, error: json.JSONDecodeError) -> InputError:
    return InputError(f"{path}, line {line}: malformed JSON: {error.msg}")


_NO_CELL = (None, "", "nan", "NaN", "-nan", "-NaN")


def _csv(path: Path) -> Rows:
    """The rows of a CSV file, with cells as text and empty ones as None.

    No types are guessed, for a guess would turn the text 007 into the number 7, and None into
    nothing. What Python, numpy and pandas write for a missing number is None, as pandas reads it.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        # Documents may be longer than the 131,072 characters that a cell may have by default.
        csv.field_size_limit(2**31 - 1)
        reader = csv.reader(file, strict=True)
        header: list[str] = []
        rows: Rows = []
        begins = 1  # the line at which the next row begins; a quoted cell may span several
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
