"""A study's tables, from runs that were written by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.study.plan import Part, Planned, Study
from fedlora.commands.study.tables import (
    Outcome,
    markdown,
    outcome,
    over_cells,
    runs_csv,
    scale_of,
    summary_csv,
    table_record,
    tables,
)

PART = Part("table", "two rules", {"ranks": ("equal", "mixed"), "method": ("exact", "flora")},
            "method", "exact", "exact_match")  # fmt: skip
LOSSES = {("equal", "exact"): 0.5, ("equal", "flora"): 0.25, ("mixed", "exact"): 0.75}


def run(path: Path, value: float | None, errors: tuple[float | None, ...] = (0.5, None)) -> None:
    """A complete run of two rounds of two clients."""
    (path / "final").mkdir(parents=True)
    lines: list[dict[str, Any]] = [
        {"event": "begin", "round": 0, "parameters": 100, "clients": [{}, {}]},
        {"event": "start", "round": 0, "evaluation": {"exact_match": 0.9}},
    ]
    for number, error in enumerate(errors, 1):
        lines.append(
            {
                "event": "round", "round": number, "clients": [{}, {}], "bytes_up": 10,
                "bytes_down": 30, "aggregation_error": error,
                "seconds": {"train": 2.0, "aggregate": 1.0, "evaluate": 9.0},
                "evaluation": {"exact_match": value},
            }
        )  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def made(tmp_path: Path) -> tuple[Study, Path]:
    """Three of four cells, two seeds; flora's run of mixed ranks is not there."""
    planned = []
    for ranks in ("equal", "mixed"):
        for method in ("exact", "flora"):
            for seed in (0, 1):
                labels = {"ranks": ranks, "method": method}
                name = f"{ranks}-{method}-{seed}"
                planned.append(Planned("table", labels, seed, {}, called=name))
                if (ranks, method) in LOSSES:
                    run(tmp_path / name, LOSSES[ranks, method] + 0.1 * seed)
    return Study("mine", "small", "which?", (PART,), tuple(planned)), tmp_path


def test_what_a_run_came_to(tmp_path: Path) -> None:
    run(tmp_path / "a", 0.5)
    result = outcome(tmp_path / "a", "exact_match")
    assert isinstance(result, Outcome)
    assert (result.value, result.best, result.error) == (0.5, 0.9, 0.5)
    assert (result.up, result.down, result.seconds) == (20, 60, 6.0)
    full = 2 * 4 * 100 * 4  # both ways, every parameter, two clients in two rounds
    assert result.traffic == pytest.approx(80 / full)
    assert result.with_base == pytest.approx((80 + 2 * 400) / full)


def test_why_a_run_has_no_outcome(tmp_path: Path) -> None:
    assert outcome(tmp_path / "absent", "loss") == "not complete"
    run(tmp_path / "a", None)
    assert outcome(tmp_path / "a", "exact_match") == "ended with a exact_match that is no number"
    run(tmp_path / "b", 0.5)
    assert outcome(tmp_path / "b", "loss") == "measures no loss (there are exact_match)"


def test_differences_are_paired_by_seed(made: tuple[Study, Path]) -> None:
    (table,) = tables(*made)
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


def test_the_page_and_the_files_have_the_same_numbers(made: tuple[Study, Path]) -> None:
    study, path = made
    made_tables = tables(study, path)
    text = markdown(study, made_tables, "about")
    assert "# mine (small)" in text
    assert "30.0 ± 7.1" in text  # of 25 and 35 %
    assert "2 runs are missing:" in text
    rows = list(csv.DictReader(io.StringIO(runs_csv(study, path))))
    assert len(rows) == 8
    assert rows[-1]["missing"] == "not complete"
    assert float(rows[2]["value"]) == 0.25
    (flora,) = [
        r for r in csv.DictReader(io.StringIO(summary_csv(made_tables))) if r["label"] == "flora"
    ]
    assert float(flora["difference"]) == pytest.approx(-0.25)
    record = table_record(made_tables[0])
    assert record["rows"][1]["values"] == {"0": 0.25, "1": 0.35}


def test_shares_are_shown_in_percent() -> None:
    assert scale_of("exact_match") == (100.0, "%")
    assert scale_of("loss") == (1.0, "")
