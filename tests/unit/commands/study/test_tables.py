"""A study's tables, from runs that were written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.commands.study.tables import over_cells, table_record, tables
from support.study_runs import study_with_runs


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
