"""How a machine trains fastest is kept for later runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora import threads
from fedlora.runs.planning import kept_choices
from fedlora.runs.planning.fastest_way import Way

WAY = Way("float32", 1, 2, 5)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(kept_choices, "cache_directory", lambda: tmp_path)
    return tmp_path


def test_what_was_written_is_read(kept: Path) -> None:
    assert kept_choices.read("a.json") is None
    kept_choices.write("a.json", WAY, "in words")
    assert kept_choices.read("a.json") == (WAY, "in words")
    assert [path.name for path in kept.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "no JSON",
        "[]",
        "{}",
        '{"way": {}, "words": ""}',
        '{"way": {"dtype": "float32", "threads": 1, "workers": 0, "clients": "many"}, "words": ""}',
        '{"way": {"dtype": "float32", "threads": 0, "workers": 0, "clients": 1}, "words": ""}',
        '{"way": {"dtype": 1, "threads": 1, "workers": 0, "clients": 1}, "words": ""}',
        '{"way": {"dtype": "float32", "threads": 1, "workers": 0, "clients": 1}, "words": 3}',
    ],
)
def test_a_damaged_file_is_none(content: str, kept: Path) -> None:
    (kept / "a.json").write_text(content)
    assert kept_choices.read("a.json") is None
    kept_choices.write("a.json", WAY, "")
    assert kept_choices.read("a.json") == (WAY, "")


def test_bytes_that_are_no_text(kept: Path) -> None:
    (kept / "a.json").write_bytes(b"\xff\xfe\x00")
    assert kept_choices.read("a.json") is None


def test_a_directory_that_cannot_be_written(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (kept / "a.json").mkdir()  # in the way of the file
    kept_choices.write("a.json", WAY, "")
    assert kept_choices.read("a.json") is None
    assert [path.name for path in kept.iterdir()] == ["a.json"]
    monkeypatch.setattr(kept_choices, "cache_directory", lambda: None)
    kept_choices.write("b.json", WAY, "")
    assert kept_choices.read("b.json") is None


def test_a_question_is_asked_of_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"shape": "llama", "tokens": 4}
    one = kept_choices.question(asked)
    assert one == kept_choices.question({"tokens": 4, "shape": "llama"})
    assert one != kept_choices.question({**asked, "tokens": 5})
    monkeypatch.setattr(threads, "cores", lambda: 1234.0)
    assert one != kept_choices.question(asked)
