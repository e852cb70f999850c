"""Reports a run's figures to the trackers of `report_to`, and goes on with their series on resume.

Figures of rounds are those of `tracker_series`. While clients train, `steps/client/K/loss` is
reported by `train/global_step`: the steps of the client that trained longest, summed over all
rounds before, and the steps of this round. TensorBoard shows these as a run of their own, `steps`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.config.config import Config
from fedlora.runs.events import Event
from fedlora.runs.file_names import METRICS
from fedlora.runs.metrics_log import read_metrics
from fedlora.runs.tracker_backends import BACKENDS, Opening, Tracker
from fedlora.runs.tracker_series import MOST_CLIENTS, most_steps, round_values
from fedlora.text import first_line

NOTES = "trackers.json"
"""Names and ids by which a resumed run goes on in the same series."""

LOGGING_STEPS = 10
"""Steps of a client that one point stands for: their mean, as `logging_steps` of transformers."""


@dataclass
class Trackers:
    """The trackers of a run; one that fails is told nothing more, and the run goes on.

    Args:
        config: of the run.
        output_dir: the run's directory.
        names: of the trackers.
        warn: told why a tracker was dropped.

    Attributes:
        trackers: those that are open, by name.
        global_step: steps of all rounds before this one, of each round's longest training.
        longest: the furthest step that a client has reached in this round.
        sums: client -> sum and number of the losses since its last point.
    """

    config: Config
    output_dir: Path
    names: Sequence[str]
    warn: Callable[[str], None]
    trackers: dict[str, Tracker] = field(default_factory=dict)
    global_step: int = 0
    longest: int = 0
    sums: dict[int, tuple[float, int]] = field(default_factory=dict)

    def __call__(self, event: Event) -> None:
        kind = event["event"]
        if kind == "begin":
            self._begin(event)
        elif kind == "step":
            self._step(event)
        elif kind in ("start", "round"):
            values = round_values(event)
            self._each(lambda tracker: tracker.round(values, event["round"]))
            if kind == "round":
                self.global_step += max(self.longest, most_steps(event))
                self.longest, self.sums = 0, {}

    def _begin(self, event: Event) -> None:
        resumed, notes = event.get("resumed_from"), dict[str, Any]()
        if resumed is not None:
            notes = self._read_notes()
            if (self.output_dir / METRICS).exists():
                lines = read_metrics(self.output_dir)
                rounds = [x for x in lines if x["event"] == "round" and x["round"] <= resumed]
                self.global_step = sum(most_steps(line) for line in rounds)
        hyperparameters = json.loads(json.dumps(self.config.flat(), default=str))
        if "parameters" in event:
            hyperparameters["model/num_parameters"] = event["parameters"]
        for name in self.names:
            own = notes.setdefault(name, {})
            opening = Opening(
                self.config, self.output_dir, hyperparameters, resumed, self.global_step, own
            )
            try:
                self.trackers[name] = BACKENDS[name](opening)
            except Exception as error:
                self._drop(name, error)
        self._write_notes({name: own for name, own in notes.items() if own})

    def _read_notes(self) -> dict[str, Any]:
        try:
            notes = json.loads((self.output_dir / NOTES).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    def _write_notes(self, notes: dict[str, Any]) -> None:
        partial = self.output_dir / f".{NOTES}.partial"
        if not notes:
            return
        try:
            partial.write_text(json.dumps(notes) + "\n", encoding="utf-8")
            partial.replace(self.output_dir / NOTES)
        except OSError as error:
            self.warn(f"report_to: {error}; once resumed, the run begins new series")

    def _step(self, event: Event) -> None:
        client, step, loss = event["client"], event["step"], event["loss"]
        self.longest = max(self.longest, step)
        if client >= MOST_CLIENTS or not self.trackers:
            return
        total, count = self.sums.get(client, (0.0, 0))
        if loss is not None and math.isfinite(loss):
            total, count = total + loss, count + 1
        if count and (step % LOGGING_STEPS == 0 or step == event["steps"]):
            values, at = {f"steps/client/{client}/loss": total / count}, self.global_step + step
            self._each(lambda tracker: tracker.steps(values, at))
            total, count = 0.0, 0
        self.sums[client] = (total, count)

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            try:
                tell(tracker)
            except Exception as error:  # a network that is gone, a disk that is full
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self.trackers.pop(name, None)
        self.warn(f"report_to: {name}: {first_line(error)}; it is told nothing more")

    def close(self, name: str, succeeded: bool) -> None:
        """Close a tracker, if it is open."""
        if (tracker := self.trackers.get(name)) is not None:
            try:
                tracker.close(succeeded)
            except Exception as error:
                self._drop(name, error)
