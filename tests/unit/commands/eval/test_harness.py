"""Scores as the harness gives them, and what it does not know."""

from __future__ import annotations

import sys

import pytest

from fedlora.commands.eval.harness import Harness, task_scores
from fedlora.errors import InputError


def test_metrics_with_their_errors_and_filters() -> None:
    output = {
        "results": {
            "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.01, "sample_len": 9},
            "gsm8k": {"exact_match,strict-match": 1, "name": "x", "flag": True},
            "empty": {"alias": "empty"},
        },
        "groups": {"all": {"acc,none": 0.25}},
        "n-samples": {"arc": {"original": 90, "effective": 9}},
    }
    assert task_scores(output) == {
        "all": {"acc": 0.25},
        "arc": {"acc": 0.5, "acc_stderr": 0.01, "rows": 9},
        "gsm8k": {"exact_match,strict-match": 1.0},
    }


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"--tasks needs lm-evaluation-harness: pip install"):
        Harness(["arc_easy"])
