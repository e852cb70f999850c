"""How many threads a run takes on a machine that others use too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora import threads
from support.threads import (
    Machine,
    keys,  # noqa: F401
    run,
    two_threads,  # noqa: F401
)

pytestmark = pytest.mark.usefixtures("kept_bases")


def test_a_system_that_does_not_tell_changes_nothing(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(threads, "_STAT", tmp_path / "none")
    assert threads.reading() is None
    assert threads.look() is None
    result, told, choices = run({**keys, "num_rounds": 1})
    assert not [x for x in told + choices if "thread" in x]
    assert "num_threads: 2\n" in (result.output_dir / "config.yaml").read_text()


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
