"""A run is submitted, followed, fetched, and submitted again; here by a server of words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.engines.nvflare import submit
from fedlora.engines.nvflare.hosting import RESULT
from fedlora.engines.nvflare.kit import AdminKit
from fedlora.engines.nvflare.session import NotRunningError, UnreachableError
from fedlora.engines.nvflare.submit import MOST_LOST, Patience, run_on_nvflare
from fedlora.errors import FedloraError, InputError
from fedlora.runs.events import Event

QUICK = Patience(poll=0.0, start=0.2, silence=0.2, server=0.2, abort=0.2, sites=0.2)
CONFIG = "method: exact\n"


def told(outcome: str | None = None, message: str = "", rounds: int = 0) -> dict[str, Any]:
    """What a job answers."""
    lines = "".join(
        json.dumps({"event": "round", "round": i + 1, "clients": []}) + "\n" for i in range(rounds)
    )
    end = None if outcome is None else {"kind": outcome, "message": message}
    return {"events": [], "metrics": lines, "offset": 0, "config": CONFIG, "outcome": end}


@dataclass
class Server:
    """Answers questions one after the other; an exception is raised.

    Args:
        answers: job by job.
        status_after: of a job that has no answer left.
    """

    answers: list[list[Any]]
    status_after: str = "FINISHED:ABNORMAL"
    there: Sequence[str] = ("alpha", "beta")
    submitted: list[dict[str, Any]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    closed: bool = False

    def connect(self, kit: AdminKit) -> Server:
        return self

    def sites(self) -> Sequence[str]:
        return self.there

    def submit(self, job: Path) -> str:
        order = job / "app_server" / "config" / "fedlora_run.json"
        self.submitted.append(json.loads(order.read_text()))
        return str(len(self.submitted) - 1)

    def running(self, name: str) -> None:
        return None

    def status(self, job: str) -> str:
        return "RUNNING" if self.answers[int(job)] else self.status_after

    def ask(self, job: str, question: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.answers[int(job)]:
            raise NotRunningError("no answer is left")
        answer = self.answers[int(job)].pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer  # type: ignore[no-any-return]

    def abort(self, job: str) -> None:
        self.aborted.append(job)
        self.answers[int(job)].clear()

    def download(self, job: str, to: Path) -> Path:
        (to / "workspace" / RESULT).mkdir(parents=True)
        return to / "workspace"

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def config(tmp_path: Path) -> Config:
    kit = tmp_path / "kit"
    (kit / "startup").mkdir(parents=True)
    admin = {"username": "ada", "host": "hub", "port": 8003}
    (kit / "startup" / "fed_admin.json").write_text(json.dumps({"admin": admin}))
    return Config(engine="nvflare", kit=str(kit), output_dir=str(tmp_path / "out"))


def run(server: Server, config: Config) -> list[str]:
    """Submit a run; gives the warnings."""
    events = list[Event]()
    try:
        run_on_nvflare(config, (), events.append, server.connect, QUICK)
    finally:
        assert server.closed
    return [event["message"] for event in events if event["event"] == "warning"]


@pytest.fixture(autouse=True)
def no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no model at the end."""
    monkeypatch.setattr(submit, "_result", lambda path: None)


def test_a_run_that_ends_is_fetched(config: Config) -> None:
    server = Server([[NotRunningError("begins"), told(), told("ended", rounds=1)]])
    assert run(server, config) == []
    (order,) = server.submitted
    assert order["sites"] == ["alpha", "beta"]
    assert order["settings"]["kit"] is None, "the admin's paths stay with the admin"
    assert not order["resumes"]
    assert (Path(config.output_dir) / "metrics.jsonl").read_text().count("round") == 2


def test_a_mistake_is_the_users(config: Config) -> None:
    server = Server([[told("mistake", "sites: alpha: no rows")]])
    with pytest.raises(InputError, match="sites: alpha: no rows"):
        run(server, config)


def test_a_failure_is_no_mistake(config: Config) -> None:
    with pytest.raises(
        FedloraError, match="has stopped at the server: ZeroDivisionError"
    ) as caught:
        run(Server([[told("failed", "ZeroDivisionError: x")]]), config)
    assert not isinstance(caught.value, InputError)


def test_a_lost_job_is_submitted_again_as_one_that_goes_on(config: Config) -> None:
    server = Server([[told(rounds=1)], [told("ended", rounds=2)]])
    (text,) = run(server, config)
    assert "the job ended as FINISHED:ABNORMAL; it is submitted again" in text
    first, second = server.submitted
    assert (first["run"], second["resumes"]) == (second["run"], True)


def test_a_job_that_flare_aborts_is_submitted_again(config: Config) -> None:
    """FLARE gives it the status of one that an admin has aborted."""
    lost = told("lost", "NVIDIA FLARE has aborted the job")
    server = Server([[lost], [told("ended")]], status_after="FINISHED:ABORTED")
    (text,) = run(server, config)
    assert text.startswith("NVIDIA FLARE has aborted the job; it is submitted again")
    assert [order["resumes"] for order in server.submitted] == [False, True]


def test_jobs_that_flare_aborts_again_and_again_are_given_up(config: Config) -> None:
    lost = told("lost", "NVIDIA FLARE has aborted the job")
    server = Server([[lost] for _ in range(MOST_LOST + 1)], status_after="FINISHED:ABORTED")
    with pytest.raises(FedloraError, match="4 times without a round between them; go on later"):
        run(server, config)


def test_a_job_that_an_admin_aborts_is_not_submitted_again(config: Config) -> None:
    """Whatever status it has: a site may have failed in the same moment."""
    server = Server([[told("stopped", "the job was aborted by bob")]])
    with pytest.raises(FedloraError, match="stopped at the server: the job was aborted by bob"):
        run(server, config)
    assert len(server.submitted) == 1


def test_a_job_that_is_silent_is_lost(config: Config) -> None:
    server = Server([[told()], [told("ended")]], status_after="RUNNING")
    server.status = lambda job: "RUNNING" if job == "0" and not server.aborted else "FINISHED"  # type: ignore[method-assign]
    (text,) = run(server, config)
    assert "the job does not answer; it is RUNNING" in text
    assert server.aborted == ["0"]


def test_jobs_that_are_lost_without_a_round_are_given_up(config: Config) -> None:
    server = Server([[told()] for _ in range(MOST_LOST + 1)])
    with pytest.raises(FedloraError, match="4 times without a round between them; go on later"):
        run(server, config)
    assert len(server.submitted) == MOST_LOST + 1


def test_a_job_that_never_began_is_not_tried_again(config: Config) -> None:
    server = Server([[]])
    with pytest.raises(FedloraError, match="FINISHED:ABNORMAL; the logs of the server and"):
        run(server, config)
    assert len(server.submitted) == 1


def test_a_server_that_is_away_is_waited_for(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, away = Server([[UnreachableError("away"), told("ended")]]), [True]

    def sites() -> Sequence[str]:
        if server.submitted and away:
            away.pop()
            raise UnreachableError("away")
        return server.there

    monkeypatch.setattr(server, "sites", sites)
    assert run(server, config) == ["away; it is waited for"]


def test_who_stops_the_run_aborts_the_job(config: Config) -> None:
    server = Server([[told(), KeyboardInterrupt()]])
    with pytest.raises(KeyboardInterrupt):
        run(server, config)
    assert server.aborted == ["0"]


def test_a_job_that_cannot_be_aborted_is_named(config: Config) -> None:
    server, events = Server([[told(), KeyboardInterrupt()]]), list[Event]()

    def abort(job: str) -> None:
        raise UnreachableError("away")

    server.abort = abort  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_on_nvflare(config, (), events.append, server.connect, QUICK)
    assert "nvflare job abort 0 --startup-kit" in events[-1]["message"]
