"""A study's page."""

from __future__ import annotations

from pathlib import Path

from fedlora.commands.study.tables import tables
from fedlora.commands.study.tables_markdown import markdown, scale_of
from support.study_runs import study_of_rates, study_with_runs


def test_the_page_has_values_in_percent_and_says_what_is_missing(tmp_path: Path) -> None:
    study, path = study_with_runs(tmp_path)
    text = markdown(study, tables(study, path), "about")
    assert "# mine (small)" in text
    assert "30.0 ± 7.1" in text  # of 25 and 35 %
    assert "2 runs are missing:" in text


def test_shares_are_shown_in_percent() -> None:
    assert scale_of("exact_match") == (100.0, "%")
    assert scale_of("loss") == (1.0, "")


def test_the_page_says_which_rate_was_chosen(tmp_path: Path) -> None:
    study, path = study_of_rates(tmp_path)
    text = markdown(study, tables(study, path))
    assert "| method | rate, best on validation rows |" in text
    assert "| `exact` | low (an end of the range) | 30.0 ± 0.0 |" in text
