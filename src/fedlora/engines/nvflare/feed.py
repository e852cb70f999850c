"""Keeps what a run tells, until the admin who has submitted it has taken it.

The admin asks again and again for what is new: events, whole lines of `metrics.jsonl`, and at the
end how it ended. A question and its answer are objects of JSON:

    question   {"events": how many are known, "metrics": bytes that are known, "sha256": of these}
    answer     {"events": [...], "metrics": text, "offset": where it begins, "config": text or null,
                "outcome": {"kind", "message"} or null}
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedlora.runs.events import Event
from fedlora.runs.file_names import CONFIG, METRICS

FEED = "fedlora_feed"
"""Topic of the command by which an admin asks what is new."""

_OUTCOME = "fedlora_outcome.json"
_MOST_EVENTS = 500
_MOST_BYTES = 1_000_000  # of metrics in one answer; a line may be longer


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Args:
        kind: `ended` (the run is complete), `stopped` (an admin has aborted it), `lost` (NVIDIA
            FLARE has aborted it), `mistake` (what was asked cannot be done; a person has to mend
            it) or `failed`.
        message: a sentence for a person; "" where all is well.
    """

    kind: Literal["ended", "stopped", "lost", "mistake", "failed"]
    message: str = ""


def write_outcome(result: Path, outcome: Outcome) -> None:
    """Leave how a job ended in its result, for an admin who was away then."""
    (result / _OUTCOME).write_text(json.dumps(asdict(outcome)) + "\n", encoding="utf-8")


def read_outcome(result: Path) -> Outcome | None:
    """How a job ended; None: it did not come to its end."""
    try:
        return Outcome(**json.loads((result / _OUTCOME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


class Feed:
    """What a run tells; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._outcome: Outcome | None = None
        self._directory: Path | None = None
        self._asked = False
        self._taken = threading.Event()

    def tell(self, event: Event) -> None:
        """Keep an event."""
        with self._lock:
            self._events.append(event)

    def of(self, directory: Path) -> None:
        """Say where the run is kept."""
        with self._lock:
            self._directory = directory

    def end(self, outcome: Outcome, patience: float) -> None:
        """Tell how it ended, and wait until the admin knows, if one has ever asked.

        Args:
            outcome: how.
            patience: seconds to wait at most.
        """
        with self._lock:
            self._outcome, asked = outcome, self._asked
        if asked:
            self._taken.wait(patience)

    def answer(self, question: Mapping[str, Any] | None) -> dict[str, Any]:
        """What is new to who asks."""
        question = question or {}
        known = _count(question.get("events"))
        with self._lock:
            self._asked = True
            events = self._events[known : known + _MOST_EVENTS]
            all_told = known + len(events) == len(self._events)
            outcome, directory = self._outcome, self._directory
        answer: dict[str, Any] = {"events": events, "metrics": "", "offset": 0, "config": None}
        more = False
        if directory is not None and (directory / CONFIG).is_file():
            answer["config"] = (directory / CONFIG).read_text(encoding="utf-8")
            offset, text, more = _new_lines(directory / METRICS, question)
            answer |= {"offset": offset, "metrics": text}
        done = outcome is not None and all_told and not more
        answer["outcome"] = asdict(outcome) if outcome and done else None
        if done and not events and not answer["metrics"]:
            self._taken.set()
        return answer


def _new_lines(path: Path, question: Mapping[str, Any]) -> tuple[int, str, bool]:
    """Whole lines that are new, where they begin, and whether there are more.

    Who knows other lines than those before is told all from the beginning.
    """
    data = path.read_bytes() if path.is_file() else b""
    known = _count(question.get("metrics"))
    if hashlib.sha256(data[:known]).hexdigest() != question.get("sha256"):
        known = 0
    whole = data.rfind(b"\n") + 1
    end = whole
    if end - known > _MOST_BYTES:
        end = data.index(b"\n", known + _MOST_BYTES) + 1
    return known, data[known:end].decode("utf-8"), end < whole


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
