"""What a run returns."""

from __future__ import annotations

from pathlib import Path

from fedlora.runs.results import Result


def test_evaluations_are_found_by_their_round() -> None:
    metrics = [
        {"event": "begin"},
        {"event": "start", "round": 0, "evaluation": {"loss": 4.0}},
        {"event": "round", "round": 1, "evaluation": None},
        {"event": "round", "round": 2, "evaluation": {"loss": 2.0}},
        {"event": "end", "round": 2},
    ]
    result = Result(Path("out"), Path("out/final"), {}, metrics, best_round=2)
    assert result.evaluations == {0: {"loss": 4.0}, 2: {"loss": 2.0}}
