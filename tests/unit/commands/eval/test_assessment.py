"""The whole of `fedlora eval`: refused before anything is written, or measured, kept and told."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedlora.commands.eval.assessment import assess
from fedlora.commands.eval.options import Loading
from fedlora.commands.eval.request import Options
from fedlora.errors import InputError


def options(what: str, **more: Any) -> Options:
    """What is asked for of a model."""
    return Options(Loading(what, use_cpu=True, num_threads=1), **more)


def test_nothing_is_written_where_nothing_can_be_measured(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="embedded is no run, so it has no held-out rows"):
        assess(options("embedded", output_dir=str(tmp_path / "eval")))
    assert list(tmp_path.iterdir()) == []


def test_general_text_on_a_model_by_itself(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some general text of no kind at all " * 4)
    told: list[Any] = []
    results = assess(
        options(
            str(tiny_llama),
            general_file=tmp_path / "text.txt",
            general_length=16,
            output_dir=str(tmp_path / "eval"),
        ),
        Console(file=io.StringIO()),
        told.append,
    )
    scores = results.of("general")["base"]
    assert scores["windows"] == 9  # 144 letters in windows of sixteen
    assert [line["event"] for line in told] == ["eval", "end"]
    assert (tmp_path / "eval" / "base" / "general.json").is_file()
