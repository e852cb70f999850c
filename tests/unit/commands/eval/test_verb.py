"""`fedlora eval`: its command line becomes what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.eval import assessment
from fedlora.commands.eval.assessment import Options
from fedlora.commands.eval.verb import verb
from fedlora.errors import InputError


def asked(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Options:
    """What would be measured."""
    given: list[Any] = []
    monkeypatch.setattr(assessment, "assess", lambda options, emit: given.append(options))
    assert verb(list(arguments)) == 0
    (options,) = given
    assert isinstance(options, Options)
    return options


def test_values_and_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from the environment")
    (tmp_path / "q.jsonl").write_text("")
    options = asked(
        monkeypatch, "out", "--tasks", "a", "b", "--limit", "0.5", "--models", "base", "client-3",
        "--mmlu_file", str(tmp_path / "q.jsonl"), "--device", "cpu", "--held_out", "false",
    )  # fmt: skip
    assert options.tasks == ("a", "b")
    assert options.limit == 0.5
    assert options.loading.models == ("base", "client-3")
    assert options.loading.use_cpu is True
    assert options.held_out is False
    assert (options.judge_model, options.judge_timeout, options.judge_threads) == (
        "gpt-4",
        120.0,
        4,
    )
    assert options.judge_key == "from the environment"
    assert options.max_new_tokens == 1024


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["out", "--judge_timeout", "soon"], "--judge_timeout: 'soon': expected a number of sec"),
        (["out", "--judge_timeout", "0"], "--judge_timeout"),
        (["out", "--limit", "1.5"], "--limit: '1.5': expected a number of items, or a share"),
        (["out", "--mmlu_file", "absent"], "--mmlu_file: absent: no such file"),
        (["out", "--task", "a"], "--task: fedlora eval has no such option; did you mean"),
        (["--tasks", "a"], "eval: name a run's directory"),
    ],
)
def test_mistakes(arguments: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        verb(arguments)
