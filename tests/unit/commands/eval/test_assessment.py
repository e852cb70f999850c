"""What `fedlora eval` measures, and what it refuses before anything is loaded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedlora.commands.eval.assessment import Options, assess
from fedlora.commands.eval.options import Loading
from fedlora.errors import InputError

HERE = Path(__file__)


def options(what: str = "embedded", **more: Any) -> Options:
    """What is asked for of a model."""
    return Options(Loading(what, use_cpu=True, num_threads=1), **more)


def test_a_runs_own_rows_are_measured_unless_something_else_is_asked_for() -> None:
    assert options().own_rows
    assert options(general_file=HERE).own_rows
    assert not options(tasks=("arc_easy",)).own_rows
    assert not options(mmlu_file=HERE).own_rows
    assert options(mmlu_file=HERE, held_out=True).own_rows
    assert not options(held_out=False).own_rows


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, "embedded is no run, so it has no held-out rows of its own; say what to measure"),
        ({"held_out": True}, "--held_out: embedded is no run"),
        ({"tasks": ("a",), "mmlu_dev_file": HERE}, "--mmlu_dev_file belongs to --mmlu_file"),
        ({"mmlu_file": HERE, "num_fewshot": 2}, "takes its worked examples from --mmlu_dev_file"),
        ({"general_file": HERE, "num_fewshot": 2}, "--num_fewshot belongs to --tasks"),
        ({"general_file": HERE, "judge_url": "http://x"}, "--judge_url: give the questions"),
        ({"general_file": HERE, "mt_bench_references": HERE}, "belongs to --mt_bench_file"),
    ],
)
def test_what_does_not_go_together(more: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        assess(options(output_dir=str(tmp_path / "eval"), **more))
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
