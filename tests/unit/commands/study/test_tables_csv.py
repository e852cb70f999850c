"""A study's CSV files."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from fedlora.commands.study.tables import tables
from fedlora.commands.study.tables_csv import runs_csv, summary_csv
from support.study_runs import study_with_runs


def test_a_line_for_every_run_also_of_one_that_is_missing(tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(runs_csv(*study_with_runs(tmp_path)))))
    assert len(rows) == 8
    assert rows[-1]["missing"] == "not complete"
    assert float(rows[2]["value"]) == 0.25


def test_a_line_for_every_row_of_a_table(tmp_path: Path) -> None:
    text = summary_csv(tables(*study_with_runs(tmp_path)))
    (flora,) = [row for row in csv.DictReader(io.StringIO(text)) if row["label"] == "flora"]
    assert float(flora["difference"]) == pytest.approx(-0.25)
