"""General text cut into windows of one length."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from fedlora.data.general_text import windows
from fedlora.data.tokenize import IGNORE
from fedlora.errors import InputError
from support.rows import write_jsonl
from support.tokens import byte_level


@cache
def tokenizer() -> Any:
    """A token per byte; it begins no text with a token of its own."""
    return byte_level(trained=False)


class WithBeginning:
    """The same, which begins every text with a token."""

    eos_token_id, bos_token_id = 0, 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def written(path: Path, text: str) -> Path:
    """A plain text."""
    (path / "text.txt").write_text(text)
    return path / "text.txt"


def test_windows_do_not_overlap_and_leave_the_first_token_out(tmp_path: Path) -> None:
    rows = windows(tokenizer(), written(tmp_path, "abcdefg"), 3)
    assert [tokenizer().decode(row["input_ids"]) for row in rows] == ["abc", "def"]  # g is alone
    for row in rows:
        assert row["labels"] == [IGNORE, *row["input_ids"][1:]]


def test_every_window_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    rows = windows(WithBeginning(), written(tmp_path, "abcde"), 3)
    assert [row["input_ids"] for row in rows] == [[1, 97, 98], [1, 99, 100], [1, 101]]


def test_documents_are_joined_by_the_end_of_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "ab"}, {"other": "x"}, {"text": "cd"}])
    (row,) = windows(tokenizer(), path, 9)
    assert tokenizer().decode(row["input_ids"]) == "ab<|endoftext|>cd"


def test_no_more_windows_than_wanted(tmp_path: Path) -> None:
    path = written(tmp_path, "abcdefghijkl")
    assert windows(tokenizer(), path, 3, limit=2) == windows(tokenizer(), path, 3)[:2]


def test_what_holds_nothing_to_predict(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="windows of 1 tokens are too short"):
        windows(tokenizer(), written(tmp_path, "abc"), 1)
    with pytest.raises(InputError, match="holds no text to predict"):
        windows(tokenizer(), written(tmp_path, "a"), 4)
    with pytest.raises(InputError, match="has no column text; it has other"):
        windows(tokenizer(), write_jsonl(tmp_path / "b.jsonl", [{"other": "x"}]), 4)
    with pytest.raises(InputError, match="cannot be read: No such file"):
        windows(tokenizer(), tmp_path / "absent.txt", 4)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="is not UTF-8 text; convert the file"):
        windows(tokenizer(), tmp_path / "latin.txt", 4)
