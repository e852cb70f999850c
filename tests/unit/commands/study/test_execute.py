"""Which runs are made, and how many at a time; no process is started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.study import execute as module
from fedlora.commands.study.execute import check_kept, execute, threads_and_processes
from fedlora.commands.study.plan import Planned
from fedlora.errors import InputError

KEYS = {"num_clients": 2, "client_ranks": [4, 4], "num_rounds": 2}


def run(name: str, **keys: Any) -> Planned:
    """A run called so."""
    return Planned("table", {}, 0, {**KEYS, **keys}, called=name)


@pytest.mark.parametrize(
    ("cores", "processes", "gpu", "wanted"),
    [
        (8, None, False, (1, 8)),
        (8, None, True, (8, 1)),
        (8, 3, False, (2, 3)),
        (2, 5, False, (1, 5)),
    ],
)
def test_threads_and_processes_are_no_more_than_cores(
    cores: int, processes: int | None, gpu: bool, wanted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert threads_and_processes(processes, gpu) == wanted


def test_what_is_complete_is_kept_and_named_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "final").mkdir(parents=True)
    told: list[Any] = []
    runs = [run("a"), run("b"), run("a")]
    failed = execute(
        runs,
        tmp_path,
        processes=1,
        gpu=False,
        on_change=lambda what, planned, message: told.append((what, planned.directory)),
    )
    assert failed == {}
    assert told == [("kept", "a"), ("kept", "b")]


def test_runs_are_started_in_order_and_failures_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pool:
        """Makes one run at a time; b fails."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.now: Planned | None = None

        @property
        def busy(self) -> bool:
            return self.now is not None

        def has_room(self) -> bool:
            return self.now is None

        def start(self, planned: Planned) -> None:
            self.now = planned

        def next_message(self) -> Any:
            planned, self.now = self.now, None
            assert planned is not None
            ok = planned.directory != "b"
            return planned, {"done": True} if ok else {"failed": "oh"}

        def stop(self) -> None:
            pass

    monkeypatch.setattr(module, "_Pool", Pool)
    told: list[Any] = []
    failed = execute(
        [run("a"), run("b"), run("c")],
        tmp_path,
        processes=1,
        gpu=False,
        on_change=lambda what, planned, message: told.append((what, planned.directory)),
    )
    assert failed == {"b": "oh"}
    assert told == [
        (what, name)
        for name, end in (("a", "done"), ("b", "failed"), ("c", "done"))
        for what in ("start", end)
    ]


def test_runs_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    planned = run("a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.yaml").write_text(planned.config(tmp_path / "a").to_yaml())
    check_kept([planned, run("absent")], tmp_path)
    with pytest.raises(InputError, match="a: made with other settings than this study has now"):
        check_kept([run("a", num_rounds=3)], tmp_path)
