"""How many threads a run takes on a machine that others use too."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora import threads
from fedlora.threads import Reading, Room
from support.threads import (
    Machine,
    two_threads,  # noqa: F401
)


@pytest.mark.parametrize(
    ("cores", "others", "wanted", "expected"),
    [
        (2, 0.0, 2, 2),
        (2, 0.4, 2, 2),
        (2, 0.9, 2, 1),
        (2, 2.0, 2, 1),
        (8, 3.0, 4, 4),
        (8, 5.0, 4, 3),
        (8, 9.0, 8, 1),
        (1, 0.0, 4, 1),
        (1.5, 0.0, 2, 2),
        (64, 40.0, 32, 24),
        (2, 3.0, 1, 1),
    ],
)
def test_as_many_threads_as_have_a_core(
    cores: float, others: float, wanted: int, expected: int
) -> None:
    assert Room(cores, others).threads(wanted) == expected


def test_our_own_work_is_not_that_of_others() -> None:
    before, after = Reading(10.0, 100.0, 50.0), Reading(20.0, 125.0, 69.0)
    found = threads.room(before, after)
    assert found is not None
    assert found.others == pytest.approx((25 - 19) / 10)
    assert threads.room(before, Reading(10.01, 100.02, 50.0)) is None
    assert threads.room(None, after) is None
    # Clocks of different grain: never less than nothing.
    assert threads.room(before, Reading(20.0, 110.0, 61.0)).others == 0.0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("150000 100000", 1.5),
        ("max 100000", float("inf")),
        ("50000 100000", 1.0),
        ("?", float("inf")),
    ],
)
def test_a_containers_limit(
    text: str, expected: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "cpu.max")
    assert threads.cores() == min(expected, len(threads._affinity()))


def test_an_older_containers_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(threads, "_QUOTA", tmp_path / "none")
    monkeypatch.setattr(threads, "_QUOTA_1", tmp_path / "quota")
    monkeypatch.setattr(threads, "_PERIOD_1", tmp_path / "period")
    assert threads.cores() == len(threads._affinity())
    (tmp_path / "quota").write_text("100000\n")
    (tmp_path / "period").write_text("100000\n")
    assert threads.cores() == 1.0


def test_a_short_burst_at_the_start_is_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, others=1.5, ours=0.0)
    busy = threads.look()
    assert busy is not None
    assert busy.others == pytest.approx(1.5)
    assert machine.read == 4

    def calmer() -> Reading:
        machine.others = 1.5 if machine.read < 6 else 0.0
        return machine.reading()

    calm = threads.look(calmer)
    assert calm is not None
    assert calm.others == 0.0
