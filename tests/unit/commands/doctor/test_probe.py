"""Libraries are tried in a process of their own; here the process is played."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence

import pytest

from fedlora.commands.doctor import probe as module
from fedlora.commands.doctor.probe import probe

NAMES = ("torch", "cuda", "mps", "hub", "transformers", "peft", "datasets")


def said(*names: str, dies_at: str = "") -> str:
    """What the process prints until it ends."""
    lines = []
    for name in names:
        lines.append(json.dumps({"trying": name}))
        if name == dies_at:
            break
        lines.append(json.dumps({"name": name, "of": name}))
    return "\n".join([*lines, "a warning of some library"])


def test_every_library_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run_probe", lambda known, seconds: (said(*NAMES), ""))
    assert probe() == {name: {"of": name} for name in NAMES}


def test_one_that_takes_the_process_down_is_left_out_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[list[str]] = []

    def run(known: Sequence[str], seconds: float) -> tuple[str, str]:
        calls.append(list(known))
        left = [name for name in NAMES if name not in known]
        return said(*left, dies_at="transformers"), "the process crashed (signal 11)"

    monkeypatch.setattr(module, "_run_probe", run)
    out = probe()
    assert out["transformers"] == {"error": "the process crashed (signal 11)"}
    assert out["peft"] == {"of": "peft"}
    assert calls == [[], ["torch", "cuda", "mps", "hub", "transformers"]]


def test_a_process_that_says_nothing_ends_the_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run_probe", lambda known, seconds: ("", "no python"))
    assert probe() == {name: {"error": "no python"} for name in NAMES}


def test_what_the_process_runs_tries_all_of_them() -> None:
    tree = ast.parse(module._PROBE)
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert defined >= set(NAMES)
