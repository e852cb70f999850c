"""The controller runs what a job orders, and tells how it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.signal import Signal

from fedlora.engines.nvflare import controller as module
from fedlora.engines.nvflare.controller import CourseController
from fedlora.engines.nvflare.feed import FEED, Outcome, read_outcome
from fedlora.engines.nvflare.kit import OWN_FILE
from fedlora.engines.nvflare.order import Order, write_job
from fedlora.errors import FedloraError, InputError
from support.flare import JOB, Engine, Workspace

ORDER = Order("0123456789abcdef", {}, ["alpha"])


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    write_job(tmp_path / "job", ORDER, ["alpha"])
    (tmp_path / OWN_FILE).parent.mkdir()
    (tmp_path / OWN_FILE).write_text(json.dumps({"runs": "runs"}))
    return Engine("server", Workspace(tmp_path, tmp_path / "job"))


def end_of(engine: Engine, monkeypatch: pytest.MonkeyPatch, host: Any) -> tuple[Any, list[str]]:
    """How a job ends whose run does this, and why FLARE is told to end it."""
    panics = list[str]()
    controller, signal = CourseController(), Signal()
    controller.system_panic = lambda reason, fl_ctx: panics.append(reason)
    monkeypatch.setattr(module, "host", lambda *arguments: host(signal, *arguments))
    with engine.new_context() as context:
        controller.start_controller(context)
        controller.control_flow(signal, context)
        controller.stop_controller(context)
    assert engine.commands[FEED](FEED, None, None)["outcome"] is not None
    return read_outcome(engine.workspace.job), panics


def test_a_run_that_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def host(signal: Signal, order: Order, config: Any, saved: Any, make: Any, *more: Any) -> None:
        report, begun = more
        assert (order, config.output_dir, saved) == (
            ORDER,
            str(tmp_path / "runs" / ORDER.run),
            None,
        )
        begun(tmp_path / "runs")
        report({"event": "end"})

    assert end_of(engine, monkeypatch, host) == (Outcome("ended"), [])


def test_a_mistake_is_said_at_both_ends(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def host(*_: Any) -> None:
        raise InputError("sites: alpha: no rows")

    outcome, panics = end_of(engine, monkeypatch, host)
    assert outcome == Outcome("mistake", "sites: alpha: no rows")
    assert panics == ["sites: alpha: no rows"]


def test_a_run_that_cannot_go_on_has_failed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def host(*_: Any) -> None:
        raise FedloraError("no space is left")

    outcome, panics = end_of(engine, monkeypatch, host)
    assert (outcome, panics) == (Outcome("failed", "no space is left"), ["no space is left"])


def test_an_aborted_job_stops_at_its_next_event(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def host(signal: Signal, order: Any, config: Any, saved: Any, make: Any, *more: Any) -> None:
        signal.trigger(True)
        more[0]({"event": "step"})
        raise AssertionError("it goes on")

    outcome, panics = end_of(engine, monkeypatch, host)
    assert (outcome.kind, panics) == ("stopped", [])


def test_who_aborts_a_job_is_told_from_flare_itself(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Path(engine.workspace.get_audit_file_path())
    log.write_text("[U:ada][A:shutdown all]\n")  # before the job began

    def ended_by(command: str) -> Outcome | None:
        def host(signal: Signal, *_: Any) -> None:
            with log.open("a") as file:
                file.write(f"[U:bob][A:{command}]\n")
            signal.trigger(True)
            raise KeyboardInterrupt

        outcome, panics = end_of(engine, monkeypatch, host)
        assert not panics
        return outcome  # type: ignore[no-any-return]

    by_itself = ended_by(f"get_job_meta {JOB}")
    assert by_itself == Outcome(
        "lost", "NVIDIA FLARE has aborted the job, and no admin asked for it"
    )
    assert ended_by(f"abort_job {JOB}") == Outcome("stopped", "the job was aborted by bob")


def test_sites_that_are_not_asked_any_more_are_no_mistake(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def host(signal: Signal, *_: Any) -> None:
        signal.trigger(True)
        raise InputError("sites: alpha: the job was aborted")

    outcome, panics = end_of(engine, monkeypatch, host)
    assert (outcome.kind, panics) == ("stopped", [])


def test_a_failure_is_told_and_left_to_flare(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def host(*_: Any) -> None:
        raise ZeroDivisionError("by us")

    with pytest.raises(ZeroDivisionError):
        end_of(engine, monkeypatch, host)
    assert read_outcome(engine.workspace.job) == Outcome("failed", "ZeroDivisionError: by us")


def test_an_abort_ends_all_waiting(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[str]()

    def host(signal: Signal, order: Any, config: Any, saved: Any, make: Any, *more: Any) -> None:
        calls = make(config, told.append)
        assert calls.transport.names() == ["alpha"]
        signal.trigger(True)
        assert calls.closing.wait(30)
        raise KeyboardInterrupt

    outcome, _ = end_of(engine, monkeypatch, host)
    assert outcome.kind == "stopped"
    assert told in ([], ["the job is aborted"])


def test_how_an_aborted_job_ends_is_written_before_it_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLARE kills a job that takes too long to end."""

    def host(signal: Signal, order: Any, config: Any, saved: Any, make: Any, *more: Any) -> None:
        calls = make(config, lambda text: None)
        signal.trigger(True)
        assert calls.closing.wait(30)
        written = read_outcome(engine.workspace.job)
        assert written is not None
        assert written.kind == "stopped"
        raise KeyboardInterrupt

    end_of(engine, monkeypatch, host)
