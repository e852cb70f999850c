"""The trackers of a run: what they hear, and what happens when one fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fedlora.errors import InputError
from fedlora.runs import tracker_backends
from fedlora.runs.progress import read_progress
from fedlora.runs.trackers import LOGGING_STEPS
from support.trackers import (
    START,
    Event,
    apart,  # noqa: F401
    begin,
    break_off,
    configured,
    report,
    whole_run,
)


def test_one_that_cannot_begin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    config = configured("tensorboard", logging_dir=str(tmp_path / "file" / "below"))
    report(config, tmp_path / "out", whole_run())
    line = capsys.readouterr().err.strip()
    assert line.startswith("warning: report_to: tensorboard: ")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("error", "problem"),
    [(KeyboardInterrupt(), "interrupted"), (InputError("no space left\nat all"), "no space left")],
)
def test_closed_in_any_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, problem: str
) -> None:
    closed: list[bool] = []

    class Watched(tracker_backends.TensorBoard):
        def close(self, succeeded: bool) -> None:
            closed.append(succeeded)
            super().close(succeeded)

    monkeypatch.setitem(tracker_backends.BACKENDS, "tensorboard", Watched)
    with pytest.raises(type(error)):
        break_off(configured("tensorboard"), tmp_path, [begin(), START], error)
    assert closed == [False]
    now = read_progress(tmp_path)
    assert now is not None
    assert (now["phase"], now["problem"]) == ("stopped", problem)


def test_a_tracker_hears_of_every_tenth_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may take its time over a point, a step must not."""
    points: list[int] = []
    tracker = SimpleNamespace(
        round=lambda values, number: None,
        steps=lambda values, step: points.append(step),
        close=lambda succeeded: None,
    )
    monkeypatch.setitem(tracker_backends.BACKENDS, "tensorboard", lambda opening: tracker)
    steps: list[Event] = [{"event": "round_begin", "round": 1, "clients": [0]}]
    steps += [
        {"event": "step", "client": 0, "step": k, "steps": 25, "loss": 1.0, "tokens": 9}
        for k in range(1, 26)
    ]
    report(configured("tensorboard"), tmp_path / "out", [begin(), START, *steps])
    assert points == [LOGGING_STEPS, 2 * LOGGING_STEPS, 25]
