"""The report's plots for a paper."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.commands.report.figures import FIGURES, draw
from support.report import collected
from support.report_runs import lines_of, write_run


def test_every_figure_is_drawn_of_a_run_that_has_all(tmp_path: Path) -> None:
    lines = lines_of(clients=3, rounds=2, layers=1)
    lines[0]["model"] = "a $model_x$"
    report = collected(write_run(tmp_path / "run", lines))
    for name, make in FIGURES.items():
        figure = make(report)
        assert figure is not None, name
        assert figure.axes, name


def test_a_figure_without_numbers_is_left_out(tmp_path: Path) -> None:
    lines = lines_of(clients=2, rounds=1, layers=1)
    for line in lines:
        line.pop("privacy", None)
    report = collected(write_run(tmp_path / "run", lines, final=False))
    assert FIGURES["privacy"](report) is None
    assert FIGURES["spectrum"](report) is None


def test_files_are_named_after_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(FIGURES) - {"seconds", "privacy"}:  # two are enough to see their names
        monkeypatch.delitem(FIGURES, name)
    report = collected(write_run(tmp_path / "run", lines_of(clients=2, rounds=1, layers=1)))
    written = draw(report, tmp_path / "both.html", ["png", "pdf"])
    assert {path.name for path in written} == {"both-seconds.png", "both-privacy.png", "both.pdf"}
    assert all(path.is_file() for path in written)


def test_a_run_of_nothing_has_a_page_that_says_so(tmp_path: Path) -> None:
    report = collected(write_run(tmp_path / "run", [], final=False))
    (path,) = draw(report, tmp_path / "it.html", ["pdf"])
    assert path.read_bytes().startswith(b"%PDF")
    assert draw(report, tmp_path / "it.html", ["png"]) == []
