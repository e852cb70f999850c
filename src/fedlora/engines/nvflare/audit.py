"""Finds out who has ended a job: an admin, or NVIDIA FLARE by itself.

FLARE aborts a job when it takes one of its processes for dead, which a busy machine is enough for.
To the job that looks like an admin's abort, and its status says the same. The server's audit log
tells them apart: FLARE writes each command of an admin there before it is carried out.
"""

from __future__ import annotations

import re
from pathlib import Path

_COMMAND = re.compile(r"\[U:(?P<user>[^\]]*)\]\[A:(?P<command>[^\]]*)\]")
_ENDS_SERVER = ("shutdown", "restart")


def log_size(log: Path) -> int:
    """How long the log is now, in bytes; 0 where there is none."""
    return log.stat().st_size if log.is_file() else 0


def who_aborted(log: Path, job: str, since: int) -> str | None:
    """The admin who has aborted a job, or ended the server under it; None: nobody has.

    Args:
        log: the server's audit log.
        job: id of the job.
        since: bytes of the log that are older than the job.

    Raises:
        OSError: the log cannot be read, so that nobody knows.
    """
    with log.open("rb") as file:
        file.seek(since)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for match in filter(None, map(_COMMAND.search, lines)):
        verb, *arguments = match["command"].split() or [""]
        verb = verb.rpartition(".")[2]  # FLARE accepts a command with its module's name before it
        if verb == "abort_job" and job in arguments:
            return match["user"]
        if verb in _ENDS_SERVER and {"server", "all"} & set(arguments):
            return match["user"]
    return None
