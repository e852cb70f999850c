"""Figures as a person reads them: times, shares, series."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.commands.watch.figures import (
    bar,
    duration,
    elapsed,
    figure,
    seconds_of,
    sparkline,
    time_left,
)
from support.watch import START, a_round, look_at, snapshot, written


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (75.4, "1:15"), (3675, "1:01:15"), (90_000, "1 d 1:00:00"), (-3, "0:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sparkline() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([(1, 5.0)], 10) == "▅"
    assert sparkline([(n, float(n)) for n in range(8)], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([(n, float(n)) for n in range(800)], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([(n, 1.0) for n in range(3)], 8) == "▅▅▅"


def test_time_left(tmp_path: Path) -> None:
    path = written(tmp_path / "run", [START, a_round(1), a_round(2)], progress=snapshot())
    left = time_left(look_at(path))
    assert left == pytest.approx(2 * 12 - 4, abs=2)  # two rounds, less what is behind in this one
    first = snapshot(round=1, finished=0, seconds_per_round=None)
    path = written(tmp_path / "first", [START], progress=first)
    assert time_left(look_at(path)) == pytest.approx(4 * 16 - 4, abs=4)  # a quarter took 4 s
    unknown = snapshot(round=1, finished=0, seconds_per_round=None, share=0.0)
    assert time_left(look_at(written(tmp_path / "0", [START], progress=unknown))) is None


def test_seconds(tmp_path: Path) -> None:
    assert seconds_of(a_round(1)) == 10.0
    assert seconds_of({"seconds": {"train": None, "evaluate": "soon"}}) == 0.0
    path = written(tmp_path / "run", [START, a_round(1), a_round(2)])
    assert elapsed(look_at(path)) == 20.0  # of an older version: what its rounds took


def test_shares() -> None:
    assert bar(0.5, 4).plain == "━━──"
    assert bar(7.0, 4).plain == "━━━━"
    assert (figure("accuracy", 0.5), figure("loss", 1.23456)) == ("50.0%", "1.235")
