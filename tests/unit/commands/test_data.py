"""`fedlora data`, as a program reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.data import verb
from fedlora.errors import InputError
from support.rows import rows, write_jsonl


def described(tiny_llama: Path, path: Path, *more: str) -> dict[str, Any]:
    """What is told of a file."""
    told: list[Any] = []
    arguments = ["--model_name_or_path", str(tiny_llama), "--train_file", str(path)]
    assert verb([*arguments, "--num_clients", "2", *more], told.append) == 0
    (line,) = told
    return dict(line)


def test_lengths_and_samples(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "all.jsonl", rows(10))
    data = described(tiny_llama, path, "--show", "2")
    assert (data["template"], data["rows"], data["clients"]) == ("prompt_completion", 10, 2)
    # A token per letter, and the end of the text, which is learnt.
    completions = [len(row["completion"]) + 1 for row in rows(10)]
    assert data["learnt_tokens"] == sum(completions)
    assert data["tokens"] == sum(len(row["prompt"]) for row in rows(10)) + sum(completions)
    assert [sample["client"] for sample in data["samples"]] == [0, 1]
    sample = data["samples"][0]
    prompt = "".join(piece["text"] for piece in sample["pieces"] if not piece["learnt"])
    assert prompt in {row["prompt"] for row in rows(10)}


def test_a_classifiers_samples_have_labels(tiny_llama: Path, tmp_path: Path) -> None:
    labelled = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(6)]
    path = write_jsonl(tmp_path / "all.jsonl", labelled)
    data = described(tiny_llama, path, "--label_column_name", "label", "--show", "1")
    assert data["learnt_tokens"] is None
    assert data["samples"][0]["label"] in ("a", "b")


def test_show_takes_a_number() -> None:
    with pytest.raises(InputError, match="--show all: expected a number of samples"):
        verb(["--show", "all"])
