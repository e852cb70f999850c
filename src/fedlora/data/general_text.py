"""Cuts general text into windows of one length, on which forgetting is measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlora.data.row_files import ENDINGS, read_rows
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.errors import InputError


def windows(
    tokenizer: Any, path: str | Path, length: int, limit: int | None = None
) -> list[Tokens]:
    """Cut a general text into rows to evaluate on, in which every token but the first has a label.

    Documents are joined with the end-of-text token between them and cut into windows that do not
    overlap. Where the tokenizer begins a text with a token of its own (BOS), every window begins
    with it, and this is the token without a label.

    Args:
        tokenizer: of transformers.
        path: plain text, or rows (JSON, JSONL, CSV, Parquet) with a column `text`.
        length: tokens of a window; the last window may be shorter.
        limit: how many windows at most, from the first; None: all.

    Raises:
        InputError: the file cannot be read, has no column `text`, or no two tokens.
    """
    begin = _beginning(tokenizer)
    size = length - len(begin)
    if size < 1 or length < 2:
        raise InputError(f"{path}: windows of {length} tokens are too short to predict any")
    needed = None if limit is None else limit * size
    stream: list[int] = []
    # Tokens have a few characters each; 40 for every token needed are more than enough to read.
    for text in _documents(Path(path), None if needed is None else 40 * needed):
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        stream.append(tokenizer.eos_token_id)
        if needed is not None and len(stream) >= needed:
            break
    else:
        stream = stream[:-1]  # nothing follows the last document
    rows: list[Tokens] = []
    for position in range(0, len(stream), size):
        ids = [*begin, *stream[position : position + size]]
        if len(ids) > 1:
            rows.append({"input_ids": ids, "labels": [IGNORE, *ids[1:]]})
    if not rows:
        raise InputError(f"{path}: holds no text to predict")
    return rows[:limit]


def _beginning(tokenizer: Any) -> list[int]:
    """The token that the tokenizer begins every text with, or none."""
    ids = list(tokenizer("a")["input_ids"])
    first = tokenizer.bos_token_id
    return [first] if first is not None and ids[:1] == [first] else []


def _documents(path: Path, characters: int | None) -> Iterator[str]:
    """The texts of a file. Plain text is one document, of which at most so many characters."""
    if path.suffix.lower() in ENDINGS:
        rows = read_rows(path)
        if not any(isinstance(row.get("text"), str) for row in rows):
            raise InputError(
                f"{path}: has no column text; it has {', '.join(map(str, rows[0]))}. Name a plain "
                "text file .txt"
            )
        yield from (row["text"] for row in rows if isinstance(row.get("text"), str))
        return
    try:
        with path.open(encoding="utf-8") as file:
            yield file.read() if characters is None else file.read(characters)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; convert the file") from None
