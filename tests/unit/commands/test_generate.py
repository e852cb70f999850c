"""`fedlora generate`: what is asked, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.generate import verb
from fedlora.errors import InputError


def test_prompts_are_answered_and_kept(tiny_llama: Path, tmp_path: Path) -> None:
    told: list[Any] = []
    (tmp_path / "questions.txt").write_text("abc>\n\nxyz>\n")
    output = tmp_path / "said.jsonl"
    arguments = [str(tiny_llama), "--prompt", "one>", "--max_new_tokens", "4", "--raw"]
    arguments += ["--prompts_file", str(tmp_path / "questions.txt"), "--output", str(output)]
    assert verb([*arguments, "--use_cpu", "--num_threads", "1"], told.append) == 0
    assert [line["prompt"] for line in told] == ["one>", "abc>", "xyz>"]
    assert all(set(line["answers"]) == {"base"} for line in told)
    kept = [json.loads(line) for line in output.read_text().splitlines()]
    assert [{"event": "answer", **record} for record in kept] == told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "generate: name a run's directory"),
        (["embedded"], "generate: give --prompt TEXT or --prompts_file F"),
        (["embedded", "--prompt", "a", "--model", "global"], "global: no such model of embedded"),
        (["embedded", "--prompt", "a", "--output", "no/x.jsonl"], "there is no such directory"),
        (["embedded", "--prompts_file", "absent.txt"], "absent.txt: no such file"),
        (["embedded", "--max_new_tokens", "0"], "expected a whole number of at least 1"),
        (["embedded", "--promt", "a"], "--promt: fedlora generate has no such option"),
    ],
)
def test_mistakes(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=says):
        verb(arguments)
