"""All numbers of a report, gathered from what runs wrote."""

from __future__ import annotations

from pathlib import Path

from fedlora.commands.report.collect import collect
from support.report import collected
from support.report_runs import lines_of, write_run


def test_what_a_run_was(tmp_path: Path) -> None:
    lines = lines_of(clients=4, rounds=3, layers=1)
    (view,) = collected(write_run(tmp_path / "run", lines)).runs
    assert (view.method, view.model, view.parameters) == ("exact", "a/model", 812345)
    assert (view.done, view.planned, view.finished) == (3, 3, True)
    assert view.clients.ranks == (32, 16, 8, 4)
    assert view.errors.rounds == (1, 2, 3)
    rounds = [line for line in lines if line["event"] == "round"]
    assert view.errors.total == tuple(line["aggregation_error"] for line in rounds)
    name = view.errors.layers[0]
    assert view.errors.cells[0] == tuple(line["layers"][name]["error"] for line in rounds)
    assert view.seconds["train"] == tuple(line["seconds"]["train"] for line in rounds)
    assert view.spectrum.source == "final"


def test_two_methods_and_two_seeds(tmp_path: Path) -> None:
    report = collected(
        write_run(tmp_path / "a", lines_of(clients=2, layers=1)),
        write_run(tmp_path / "b", lines_of(clients=2, layers=1, seed=1), seed=1),
        write_run(tmp_path / "c", lines_of(clients=2, layers=1, method="flora"), method="flora"),
    )
    assert [one.runs for one in report.series] == [(0, 1), (2,)]
    assert [view.series for view in report.runs] == [0, 0, 1]
    differing = dict(report.differing)
    assert differing["method"] == ("exact", "exact", "flora")
    panels = {panel.measure: panel for panel in report.panels if panel.kind == "evaluation"}
    assert len(panels["loss"].lines) == 2


def test_no_runs_at_all_is_an_empty_report() -> None:
    report = collect([], [])
    assert (report.runs, report.series, report.panels) == ((), (), ())
