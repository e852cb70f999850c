"""A study's tables, from runs that were written by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedlora.commands.study.tables import over_cells, table_record, tables
from support.study_runs import finished_run, study_of_rates, study_with_runs


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    (table,) = tables(*study_with_runs(tmp_path))
    assert table.cells == [("equal",), ("mixed",)]
    rows = {(row.cell[0], row.label): row for row in table.rows}
    assert rows["equal", "flora"].values == pytest.approx([0.25, 0.35])
    difference = rows["equal", "flora"].difference
    assert difference is not None
    assert difference.mean == pytest.approx(-0.25)
    assert rows["equal", "exact"].difference is None
    assert set(table.missing.values()) == {"not complete"}
    overall = over_cells(table, "flora")
    assert overall is not None
    assert overall[1] == 1  # one cell has both


def test_a_program_reads_every_value_by_its_seed(tmp_path: Path) -> None:
    (table,) = tables(*study_with_runs(tmp_path))
    exact, flora = table_record(table)["rows"][:2]
    assert flora["values"] == {"0": 0.25, "1": 0.35}
    assert flora["difference"]["seeds"] == 2
    assert flora["difference"]["mean"] == pytest.approx(-0.25)
    assert (exact["difference"], exact["verdict"]) == (None, None)


def test_a_rate_is_chosen_on_held_out_rows_and_reported_on_others(tmp_path: Path) -> None:
    (table,) = tables(*study_of_rates(tmp_path))
    assert [(row.cell, row.label, row.chosen) for row in table.rows] == [
        ((), "exact", "low"),
        ((), "flora", "high"),
    ]
    assert [row.values for row in table.rows] == [
        pytest.approx([0.3, 0.3]),
        pytest.approx([0.7, 0.7]),
    ]
    difference = table.rows[1].difference
    assert difference is not None
    assert difference.mean == pytest.approx(0.4)
    record = table_record(table)
    assert (record["choose"], record["rows"][0]["chosen"]) == ("rate", "low")


def test_a_rate_that_lacks_a_seed_is_not_chosen(tmp_path: Path) -> None:
    study, path = study_of_rates(tmp_path)
    (path / "low-exact-1" / "final").rmdir()
    (table,) = tables(study, path)
    assert table.rows[0].chosen == "high"


def test_what_was_not_measured_on_held_out_rows_is_missing(tmp_path: Path) -> None:
    study, path = study_of_rates(tmp_path)
    shutil.rmtree(path / "low-flora-0")
    finished_run(path / "low-flora-0", 0.5)
    (table,) = tables(study, path)
    why = "measures no exact_match on rows that clients hold out"
    assert dict(table.missing) == {"low, flora, seed 0": why}
