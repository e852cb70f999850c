"""Cuts general text into windows of one length, on which forgetting is measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedlora.data.rows import ENDINGS, read_rows
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.errors import InputError


def windows(
    tokenizer: Any, path: str | Path, length: int, limit: int | None = None
) -> list[Tokens]:
    """A general text as rows to evaluate on, every token but the first labelled.

    Documents are joined with the end-of-text token between them and cut into windows that do not
    overlap. Where the tokenizer begins a text with a token of its own (BOS), every window does, and
    that is the one without a label.

    Args:
        tokenizer: of transformers.
        path: plain text, or rows (JSON, JSONL, CSV, Parquet) with a column `text`.
        length: tokens of a window; the last one may be shorter.
        limit: windows at most, from the first.

    Raises:
        InputError: the file cannot be read, has no column `text`, or no two tokens.
    """
    begin = _beginning(tokenizer)
    size = length - len(begin)
    if size < 1 or length < 2:
        raise InputError(f"{path}: windows of {length} tokens are too short to predict any")
    wanted = None if limit is None else limit * size
    stream: list[int] = []
    for text in _documents(Path(path), None if wanted is None else 40 * wanted):
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
        stream.append(tokenizer.eos_token_id)
        if wanted is not None and len(stream) >= wanted:
            break
    else:
        stream = stream[:-1]
    rows: list[Tokens] = []
    for at in range(0, len(stream), size):
        ids = [*begin, *stream[at : at + size]]
        if len(ids) > 1:
            rows.append({"input_ids": ids, "labels": [IGNORE, *ids[1:]]})
    if not rows:
        raise InputError(f"{path}: holds no text to predict")
    return rows[:limit]


def _beginning(tokenizer: Any) -> list[int]:
    ids = list(tokenizer("a")["input_ids"])
    first = tokenizer.bos_token_id
    return [first] if first is not None and ids[:1] == [first] else []


def _documents(path: Path, letters: int | None) -> Iterator[str]:
    """The texts of a file: a plain text is one document, at most so many letters of it."""
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
            yield file.read() if letters is None else file.read(letters)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; convert the file") from None
