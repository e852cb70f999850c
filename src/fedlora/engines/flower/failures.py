"""Says in words what Flower's error codes mean, and what kind of a failed call each of them is."""

from __future__ import annotations

from typing import Any

from fedlora.engines.carrier import SiteError

_WORDS = {
    0: ("failed", "Flower tells an unknown error"),
    1: ("mistake", "its ClientApp cannot be loaded"),
    2: ("failed", "its ClientApp raised an exception"),
    3: ("died", "the message is lost, or was not taken in time (its ttl)"),
    4: ("died", "the reply was not there in time (the message's ttl)"),
    5: ("died", "its SuperNode is not connected any more"),
    6: ("mistake", "a mod of its ClientApp refuses the message"),
    7: ("mistake", "the app bundle is not valid there"),
    8: ("died", "its ClientApp's process has ended"),
}
"""Code of `flwr.common.constant.ErrorCode` -> kind of a `SiteError`, and what it means."""


def in_words(error: Any) -> str:
    """An error of Flower (`flwr.app.Error`) on one line, with the node's own reason."""
    return site_error(error).reason


def site_error(error: Any) -> SiteError:
    """An error of Flower as what became of a call to a site.

    Args:
        error: of a reply, a `flwr.app.Error`.
    """
    kind, words = _WORDS.get(error.code, _WORDS[0])
    reason = _last_line(error.reason or "")
    return SiteError(kind, f"{words}: {reason}" if reason else f"{words} (code {error.code})")


def _last_line(text: str) -> str:
    """The last line of a reason, which of a traceback is the exception."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
