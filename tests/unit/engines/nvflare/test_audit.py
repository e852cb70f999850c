"""The server's audit log says who has ended a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.engines.nvflare.audit import log_size, who_aborted

JOB, OTHER = "988ef60b-ba4a-436c-ba7e-5b281d760ee2", "751b917e-7455-4cf0-ae38-1317e8bce50b"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "audit.log"


def write(log: Path, user: str, command: str) -> None:
    """A line as FLARE's `Auditor` writes it."""
    with log.open("a") as file:
        file.write(f"[E:0b1c][T:2026-11-26 17:53:03.370196][U:{user}][A:{command}]\n")


@pytest.mark.parametrize(
    "command", [f"abort_job {JOB}", f"job_mgmt.abort_job {JOB}", "shutdown all", "restart server"]
)
def test_who_ends_a_job_is_named(log: Path, command: str) -> None:
    write(log, "bob@example.org", f"get_job_meta {JOB}")
    write(log, "ada@example.org", command)
    assert who_aborted(log, JOB, 0) == "ada@example.org"


@pytest.mark.parametrize(
    "command", [f"abort_job {OTHER}", f"get_job_meta {JOB}", "shutdown client alpha", ""]
)
def test_what_else_admins_do_ends_no_job(log: Path, command: str) -> None:
    write(log, "ada@example.org", command)
    log.write_text(log.read_text() + f"[E:1f][T:2026][J:{JOB}]received result from client 'a'\n")
    assert who_aborted(log, JOB, 0) is None


def test_what_is_older_than_the_job_is_not_about_it(log: Path) -> None:
    assert log_size(log) == 0
    write(log, "ada@example.org", "restart server")
    assert who_aborted(log, JOB, log_size(log)) is None


def test_without_a_log_nobody_knows(log: Path) -> None:
    with pytest.raises(OSError, match=r"audit\.log"):
        who_aborted(log, JOB, 0)
