"""What a run came to, from its log."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.commands.study.outcomes import Outcome, outcome
from support.study_runs import finished_run


def test_what_a_run_came_to(tmp_path: Path) -> None:
    finished_run(tmp_path / "a", 0.5)
    result = outcome(tmp_path / "a", "exact_match")
    assert isinstance(result, Outcome)
    assert (result.value, result.best, result.error) == (0.5, 0.9, 0.5)
    assert (result.up, result.down, result.seconds) == (20, 60, 6.0)
    full = 2 * 4 * 100 * 4  # both ways, every parameter, two clients in two rounds
    assert result.traffic == pytest.approx(80 / full)
    assert result.with_base == pytest.approx((80 + 2 * 400) / full)


def test_why_a_run_has_no_outcome(tmp_path: Path) -> None:
    assert outcome(tmp_path / "absent", "loss") == "not complete"
    finished_run(tmp_path / "a", None)
    assert outcome(tmp_path / "a", "exact_match") == "ended with a exact_match that is no number"
    finished_run(tmp_path / "b", 0.5)
    assert outcome(tmp_path / "b", "loss") == "measures no loss (there are exact_match)"


def test_clients_count_by_the_rows_they_hold_out(tmp_path: Path) -> None:
    finished_run(tmp_path / "a", 0.5, held_out=(0.2, 0.6))
    finished_run(tmp_path / "b", 0.5)
    found = [outcome(tmp_path / name, "exact_match") for name in ("a", "b")]
    validations = [x.validation for x in found if isinstance(x, Outcome)]
    assert validations == [pytest.approx((3 * 0.2 + 0.6) / 4), None]
