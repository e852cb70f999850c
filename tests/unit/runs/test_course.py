"""The best round so far, and what a run's result tells of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.methods import METHODS
from fedlora.runs.best_round import Best
from fedlora.runs.course import has_personal_models
from fedlora.runs.results import Result


@pytest.mark.parametrize(
    ("greater", "values", "best"),
    [
        (False, [3.0, 2.0, 2.5, 2.0], Best(1, 2.0, 2)),  # the first of two that are alike
        (True, [0.1, 0.3, 0.2], Best(1, 0.3, 1)),
        (False, [3.0, float("nan"), 2.0], Best(2, 2.0, 0)),
        (True, [float("inf"), float("nan")], Best(None, None, 2)),
        (False, [], Best()),
    ],
)
def test_the_best_round(greater: bool, values: list[float], best: Best) -> None:
    now = Best()
    for number, value in enumerate(values):
        now = now.after(number, value, greater=greater)
    assert now == best


def test_evaluations_of_a_result_by_round() -> None:
    lines: list[dict[str, Any]] = [
        {"event": "begin", "round": 0},
        {"event": "start", "round": 0, "evaluation": {"loss": 3.0}},
        {"event": "round", "round": 1},
        {"event": "round", "round": 2, "evaluation": {"loss": 2.0}},
    ]
    result = Result(Path("out"), Path("out/final"), {}, lines, 2)
    assert result.evaluations == {0: {"loss": 3.0}, 2: {"loss": 2.0}}


def test_rules_whose_clients_keep_a_model_of_their_own() -> None:
    for name, rule in METHODS.items():
        session: Any = SimpleNamespace(config=Config(method=name))
        assert has_personal_models(session) is bool(rule.training(rule.options()).keeps)
    assert has_personal_models(SimpleNamespace(config=Config(method="fedsa")))  # type: ignore[arg-type]
