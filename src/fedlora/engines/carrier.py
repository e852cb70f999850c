"""Carries messages to the worker of a site over its socket, and brings back the answers.

Standard library alone, so that an engine's client process, which imports neither torch nor
transformers, starts at once:

    from fedlora.engines import carrier
    answer = carrier.call("/run/fedlora/clinic.sock", message, seconds=600)

An address is always a path. There lies a Unix socket; or, of a worker that was told to listen on a
loopback port, a file that the worker wrote, which holds the port and the token that a call has to
show. Socket and file can be opened by the worker's user alone.

Every call is a connection of its own, two frames there and two back (`fedlora.engines.frames`):

    call      {"call": "message" | "status" | "cancel" | "stop", "token": null | text,
               "seconds": null | number}, and a message or nothing
    answer    {"ok": true} and a payload, or {"ok": false, "kind": KIND, "reason": text} and nothing
"""

from __future__ import annotations

import json
import math
from contextlib import closing
from typing import Any

from fedlora.engines.frames import FrameError, Timer, connected, receive, send

KINDS = ("refused", "lost", "busy", "failed", "deadline", "mistake", "absent", "died")
"""What can become of a call:

- refused: the worker does not take this message, and will not take it if it is sent again: it
  belongs to another run, round, base or agreement, or asks for more than the site allows;
- lost: the message tells changes of a global model that the worker does not hold; it takes one
  that brings all of it;
- busy: it is at another message;
- failed: its training failed, and might do better if it is tried again;
- deadline: the time was over, or the call was cancelled;
- mistake: what the site was told or has cannot be used; a person has to mend it;
- absent: nobody answers at the address;
- died: the worker ended before it had answered; it may be up again in a moment.
"""

_QUICK = 20.0  # seconds for what needs no training; a worker that starts imports torch first
_GRACE = 10.0  # seconds beyond a deadline in which the worker says itself that it has passed


class SiteError(Exception):
    """A worker that does not do what it was asked.

    Args:
        kind: one of `KINDS`.
        reason: a sentence that says what is wrong, and what to do where that is known.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


def call(address: str, message: bytes, *, seconds: float | None = None) -> bytes:
    """Hand the worker a message, and wait for its answer.

    Args:
        address: of the worker's socket.
        message: of `fedlora.federation.envelope`, as bytes.
        seconds: until the deadline, when the worker gives up; None: as long as it takes.

    Returns:
        The message that it answers.

    Raises:
        SiteError: what became of it instead.
    """
    wait = None if seconds is None else max(0.0, seconds) + _GRACE
    return _ask(address, "message", message, seconds, wait)


def status(address: str) -> dict[str, Any]:
    """What the worker is at. It answers while it trains.

    Raises:
        SiteError: nobody answers.
    """
    answer = _ask(address, "status", b"", None, _QUICK)
    try:
        status = json.loads(answer)
    except (ValueError, RecursionError):
        status = None
    if not isinstance(status, dict):
        raise SiteError("mistake", f"{address}: what answers there is no worker of fedlora")
    return status


def cancel(address: str) -> None:
    """End what the worker is at after its next step; that call is answered with "deadline".

    Raises:
        SiteError: nobody answers.
    """
    _ask(address, "cancel", b"", None, _QUICK)


def stop(address: str) -> None:
    """End the worker for good.

    Raises:
        SiteError: nobody answers.
    """
    _ask(address, "stop", b"", None, _QUICK)


def _ask(
    address: str, name: str, payload: bytes, seconds: float | None, wait: float | None
) -> bytes:
    """Make one call, and give the payload of its answer."""
    timer = Timer.of(wait)
    try:
        connection, token = connected(address, timer)
    except (OSError, FrameError) as error:
        raise _absent(address, error) from None
    with closing(connection):
        text = {"call": name, "token": token, "seconds": seconds}
        try:
            send(connection, text, payload, timer)
            answer, result = receive(connection, timer)
        except TimeoutError:
            raise SiteError(
                "deadline", f"{address}: the worker did not answer in {math.ceil(wait or 0)} s"
            ) from None
        except (OSError, FrameError) as error:
            raise SiteError(
                "died",
                f"{address}: the worker ended before it had answered ({_why(error)}); its log says "
                "more",
            ) from None
    if answer.get("ok") is True:
        return result
    kind, reason = answer.get("kind"), answer.get("reason")
    if kind not in KINDS or not isinstance(reason, str):
        raise SiteError("mistake", f"{address}: what answers there is no worker of fedlora")
    raise SiteError(kind, reason)


def _absent(address: str, error: OSError | FrameError) -> SiteError:
    """What to tell of a worker that cannot be called."""
    start = "start it with: fedlora worker --site SITE.yaml"
    if isinstance(error, FileNotFoundError):
        return SiteError("absent", f"{address}: no worker has its socket there; {start}")
    if isinstance(error, ConnectionRefusedError):
        return SiteError("absent", f"{address}: its worker is not running; {start}")
    if isinstance(error, PermissionError):
        return SiteError(
            "absent", f"{address}: its worker can be called by its own user alone; be that user"
        )
    if isinstance(error, TimeoutError):
        return SiteError("absent", f"{address}: its worker takes no call; look at its log")
    return SiteError("absent", f"{address}: cannot be called: {_why(error)}")


def _why(error: OSError | FrameError) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
