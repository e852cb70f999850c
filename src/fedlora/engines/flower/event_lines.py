"""Carries a run's events in a log, as lines of JSON behind a mark, and finds them there again."""

from __future__ import annotations

import json
from typing import Any

from fedlora.runs.events import Event

_MARK = "fedlora-event "


def event_line(event: Event) -> str:
    """An event as a line of a log."""
    return _MARK + json.dumps(event, separators=(",", ":"))


def read_event(line: str) -> dict[str, Any] | None:
    """The event in a line of a log; None: there is none."""
    _, mark, text = line.partition(_MARK)
    if not mark:
        return None
    try:
        event = json.loads(text)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
