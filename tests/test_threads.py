"""How many threads a run takes on a machine that others use too."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlora
from fedlora import threads
from fedlora.threads import Reading, Room


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Machine:
    """A machine of two cores whose clocks are made up: `others` are busy, we are too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others: float, ours: float = 2.0) -> None:
        self.others, self.ours, self.read = others, ours, 0
        self.clock = Reading(0.0, 0.0, 0.0)
        monkeypatch.setattr(threads, "reading", self.reading)
        monkeypatch.setattr(threads, "cores", lambda: 2.0)
        monkeypatch.setattr(threads.time, "sleep", lambda seconds: None)

    def reading(self) -> Reading:
        """One second later at each reading."""
        self.read += 1
        was = self.clock
        self.clock = Reading(was.time + 1, was.busy + self.others + self.ours, was.own + self.ours)
        return self.clock


def run(
    keys: dict[str, Any], wanted: int = 2, **options: Any
) -> tuple[fedlora.Result, list[str], list[str]]:
    told, choices = list[str](), list[str]()

    def report(event: Any) -> None:
        if event["event"] == "warning":
            told.append(event["message"])
        if event["event"] == "begin":
            choices.extend(event["choices"])

    config = None if "resume" in options else fedlora.Config(**keys)
    torch.set_num_threads(wanted)
    return fedlora.run(config, report=report, **options), told, choices


@pytest.fixture
def keys(small_run: dict[str, Any]) -> dict[str, Any]:
    return {
        **small_run,
        "num_threads": None,
        "num_rounds": 4,
        "max_steps": 1,
        "eval_file": None,
        "dtype": "float32",
        "eval_exact_match": False,
        "use_cpu": True,
    }


# --- the arithmetic ---


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


def test_a_system_that_does_not_tell_changes_nothing(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(threads, "_STAT", tmp_path / "none")
    assert threads.reading() is None
    assert threads.look() is None
    result, told, choices = run({**keys, "num_rounds": 1})
    assert not [x for x in told + choices if "thread" in x]
    assert "num_threads: 2\n" in (result.output_dir / "config.yaml").read_text()


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


# --- runs ---


def test_a_busy_machine_at_the_start(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, others=1.0)
    result, told, choices = run(keys)
    assert torch.get_num_threads() == 1
    assert [
        x for x in choices if x.startswith("1 thread instead of 2: other processes keep 1.0 of")
    ]
    assert not [x for x in told if "thread" in x]
    assert "num_threads: 1\n" in (result.output_dir / "config.yaml").read_text()
    assert all("num_threads" not in line for line in result.metrics)


def test_a_number_that_is_configured_stays(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, others=1.0)
    result, told, choices = run({**keys, "num_threads": 2})
    assert torch.get_num_threads() == 2
    assert len([x for x in told if x.startswith("num_threads is 2, and other processes")]) == 1
    assert not [x for x in choices if "thread" in x]
    assert "num_threads: 2\n" in (result.output_dir / "config.yaml").read_text()


def test_a_quiet_machine_changes_nothing(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, others=0.1)
    result, told, choices = run(keys)
    assert torch.get_num_threads() == 2
    assert not [x for x in told + choices if "thread" in x]
    assert all("num_threads" not in line for line in result.metrics)


def test_one_thread_needs_no_measurement(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, others=1.0)
    run({**keys, "num_threads": 1, "num_rounds": 1})
    assert machine.read == 0


def test_others_that_come_later_and_a_resumed_run(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Others come in round 2: from round 3 on there is one thread, also where it is resumed."""
    used: list[tuple[int, int]] = []

    def course(out: str, stop: int | None) -> tuple[Any, list[str], list[str]]:
        machine = Machine(monkeypatch, others=0.0)

        def watching(done: Any) -> None:
            used.append((done.record.round, torch.get_num_threads()))
            if done.record.round == 1:
                machine.others = 1.0
            if done.record.round == stop:
                raise KeyboardInterrupt

        return run({**keys, "output_dir": str(tmp_path / out)}, callbacks=[watching])

    whole, told, _ = course("whole", None)
    assert used == [(1, 2), (2, 1), (3, 1), (4, 1)]
    assert [x for x in told if x.startswith("from round 3 on 1 thread instead of 2: other proc")]
    lines = {line["round"]: line for line in whole.metrics if line["event"] == "round"}
    assert [lines[n].get("num_threads") for n in (1, 2, 3, 4)] == [None, None, 1, 1]
    assert "num_threads: 2\n" in (whole.output_dir / "config.yaml").read_text()

    used.clear()
    with pytest.raises(KeyboardInterrupt):
        course("again", 2)
    Machine(monkeypatch, others=0.0)  # it is quiet again, and the choice stays
    seen: list[int] = []
    resumed, _, _ = run(
        {},
        resume=tmp_path / "again",
        callbacks=[lambda done: seen.append(torch.get_num_threads())],
    )
    assert seen == [1, 1]
    weights = "adapter_model.safetensors"
    assert (resumed.final_dir / weights).read_bytes() == (whole.final_dir / weights).read_bytes()


def test_a_resumed_run_may_still_lower_what_it_chose(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(done: Any) -> None:
        raise KeyboardInterrupt

    machine = Machine(monkeypatch, others=0.0)
    with pytest.raises(KeyboardInterrupt):
        run(keys, callbacks=[stop])

    def busier(done: Any) -> None:
        machine.others = 1.0

    _, told, _ = run({}, resume=keys["output_dir"], callbacks=[busier])
    assert [x for x in told if x.startswith("from round 4 on 1 thread instead of 2")]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux")
def test_beside_processes_that_are_really_busy(keys: dict[str, Any]) -> None:
    """One for every core, so that none is free whatever else runs here."""
    count = len(os.sched_getaffinity(0))
    loop = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(loop) for _ in range(count)]
    try:
        time.sleep(0.5)
        _, _, choices = run({**keys, "num_rounds": 1}, max(2, count))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert [x for x in choices if "instead of" in x and "other processes keep" in x]
