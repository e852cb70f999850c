"""What FLARE's sessions raise is told in words, and a broken session is opened anew."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.fuel.flare_api import api_spec, flare_api

from fedlora.engines.nvflare.kit import AdminKit
from fedlora.engines.nvflare.session import (
    AdminSession,
    NotRunningError,
    SilentError,
    UnreachableError,
    connect,
    has_ended,
)
from fedlora.errors import InputError

KIT = AdminKit(Path("/kit"), "ada@hub.org", "hub.org:8003")


class Flare:
    """FLARE's session, whose commands do what a test says."""

    def __init__(self, **commands: Callable[..., Any]) -> None:
        self.commands, self.closed = commands, False

    def __getattr__(self, name: str) -> Any:
        return self.commands[name]

    def close(self) -> None:
        self.closed = True


def raising(error: Exception) -> Callable[..., Any]:
    def command(*_: Any, **__: Any) -> Any:
        raise error

    return command


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> list[Flare]:
    """Sessions that are opened, one after the other."""
    sessions: list[Flare] = []

    def new_secure_session(user: str, kit: str, **_: Any) -> Flare:
        assert (user, kit) == ("ada@hub.org", "/kit")
        return sessions.pop(0)

    monkeypatch.setattr(flare_api, "new_secure_session", new_secure_session)
    return sessions


def session_of(opening: list[Flare], **commands: Callable[..., Any]) -> AdminSession:
    opening.append(Flare(**commands))
    return connect(KIT)


def test_who_has_no_nvflare_is_told_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvflare", None)
    with pytest.raises(InputError, match=r"pip install 'fedlora\[nvflare\]'"):
        connect(KIT)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (
            api_spec.AuthenticationError("bad certificate"),
            InputError,
            "does not let ada@hub.org in",
        ),
        (api_spec.NoConnection("refused"), UnreachableError, "hub.org:8003 cannot be reached"),
        (RuntimeError("handshake"), UnreachableError, "belong to the federation of this kit"),
    ],
)
def test_a_login_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], said: str
) -> None:
    monkeypatch.setattr(flare_api, "new_secure_session", raising(error))
    with pytest.raises(kind, match=said):
        connect(KIT)


def test_sites_that_were_not_heard_lately_are_not_there(opening: list[Flare]) -> None:
    now = time.time()
    clients = [("gamma", now), ("alpha", now - 3), ("beta", now - 900)]
    info = SimpleNamespace(
        client_info=[SimpleNamespace(name=n, last_connect_time=t) for n, t in clients]
    )
    session = session_of(opening, get_system_info=lambda: info)
    assert session.sites() == ["alpha", "gamma"]


def test_jobs_are_submitted_found_and_aborted(opening: list[Flare], tmp_path: Path) -> None:
    aborted = list[str]()
    jobs = [
        {"job_name": "fedlora-1", "status": "FINISHED:COMPLETED", "job_id": "a"},
        {"job_name": "fedlora-1", "status": "RUNNING", "job_id": "b"},
        {"job_name": "fedlora-12", "status": "RUNNING", "job_id": "c"},
    ]
    session = session_of(
        opening,
        submit_job=lambda path: f"job of {path}",
        list_jobs=lambda name_prefix: jobs,
        get_job_status=lambda job: "RUNNING",
        abort_job=aborted.append,
        download_job_result=lambda job, to: f"{to}/{job}",
    )
    assert session.submit(tmp_path) == f"job of {tmp_path}"
    assert session.running("fedlora-1") == "b"
    assert session.running("fedlora-2") is None
    assert session.status("b") == "RUNNING"
    session.abort("b")
    assert aborted == ["b"]
    assert session.download("b", tmp_path) == tmp_path / "b" / "workspace"


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (api_spec.AuthorizationError("app_command"), InputError, '"app_command": "n:submitter"'),
        (api_spec.AuthorizationError("submit_job"), InputError, "may not submit runs to this"),
        (api_spec.JobNotRunning("ended"), NotRunningError, "ended"),
        (api_spec.InternalError("no app command func"), SilentError, "no app command func"),
    ],
)
def test_what_a_job_does_not_answer_is_told(
    opening: list[Flare], error: Exception, kind: type[Exception], said: str
) -> None:
    session = session_of(opening, do_app_command=raising(error))
    with pytest.raises(kind, match=said):
        session.ask("job", {})


def test_an_answer_that_is_none_is_no_answer(opening: list[Flare]) -> None:
    session = session_of(opening, do_app_command=lambda *_: {})
    with pytest.raises(NotRunningError, match="does not answer"):
        session.ask("job", {})


def test_a_broken_session_is_opened_anew(opening: list[Flare]) -> None:
    session = session_of(opening, get_job_status=raising(api_spec.SessionClosed("closed")))
    with pytest.raises(UnreachableError, match="is not reached: closed"):
        session.status("job")
    opening.append(Flare(get_job_status=lambda job: "RUNNING"))
    assert session.status("job") == "RUNNING"
    session.close()


def test_all_ends_of_a_job_are_ends() -> None:
    assert has_ended("FINISHED:ABNORMAL")
    assert not has_ended("RUNNING")
