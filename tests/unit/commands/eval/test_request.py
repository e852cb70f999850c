"""What `fedlora eval` is asked for, and what it refuses before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.eval.options import Loading
from fedlora.commands.eval.request import Options, check
from fedlora.commands.eval.subject import find_subject
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
def test_what_does_not_go_together_is_refused(more: dict[str, Any], says: str) -> None:
    asked = options(**more)
    with pytest.raises(InputError, match=says):
        check(find_subject(asked.loading), asked)
