"""`report_to`: names, values, what TensorBoard's files hold, and what happens when one fails."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlora.errors import InputError
from fedlora.runs import tracker_backends, tracker_checks
from fedlora.runs.observers import observers
from fedlora.runs.progress import read_progress
from fedlora.runs.tracker_checks import check_trackers
from fedlora.runs.tracker_series import most_steps, round_values
from support.trackers import (
    EXPECTED,
    LOCAL,
    START,
    Event,
    a_round,
    agree,
    apart,  # noqa: F401
    begin,
    break_off,
    configured,
    report,
    tensorboard_scalars,
    whole_run,
)


def test_tensorboard(tmp_path: Path) -> None:
    report(configured("tensorboard"), tmp_path / "out", whole_run())
    found = tensorboard_scalars(tmp_path / "out" / "runs")
    agree(found, EXPECTED)
    assert not any(math.isnan(x) for series in found.values() for x in series.values())
    assert "train/truncation_error" not in found  # null
    assert tensorboard_scalars(tmp_path / "out" / "runs" / "steps") == LOCAL
    accumulator = EventAccumulator(str(tmp_path / "out" / "runs")).Reload()
    assert "config/text_summary" in accumulator.Tags()["tensors"]
    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"learning_rate" in content


def test_tensorboard_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "env"))
    report(configured("tensorboard"), tmp_path / "one", whole_run())
    given = configured(["tensorboard"], logging_dir=str(tmp_path / "key"))
    report(given, tmp_path / "two", whole_run())
    for where in ("env", "key"):
        agree(tensorboard_scalars(tmp_path / where), EXPECTED)
    assert not (tmp_path / "one" / "runs").exists()


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("none", []),
        (["none"], []),
        ([], []),
        (["tensorboard", "tensorboard"], ["tensorboard"]),
        (["trackio", "tensorboard"], ["trackio", "tensorboard"]),
    ],
)
def test_names(wanted: Any, names: list[str]) -> None:
    assert check_trackers(configured(wanted)) == names


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'tensorbord' is none of .*; did you mean tensorboard\?"):
        check_trackers(configured(["wandb", "tensorbord"]))
    with pytest.raises(InputError, match="mlflow"), observers(configured("mlflow"), tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []  # before anything is written


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tracker_checks.find_spec
    monkeypatch.setattr(tracker_checks, "find_spec", lambda n: None if n == "wandb" else real(n))
    with pytest.raises(InputError, match=r"wandb is not installed; pip install 'fedlora\[tracke"):
        check_trackers(configured("wandb"))
    assert check_trackers(configured("all")) == ["tensorboard", "trackio"]


def test_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match="trackio"):
        check_trackers(configured("trackio"))


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


def test_a_line_as_values() -> None:
    found = round_values(a_round(1))
    assert all(isinstance(x, float) and math.isfinite(x) for x in found.values())
    assert not any("per_class" in name or "layers" in name for name in found)
    assert most_steps(a_round(1, steps=7)) == 7
    assert round_values({"event": "start", "round": 0}) == {}


def test_many_clients_do_not_drown_a_dashboard() -> None:
    line = a_round(1)
    line["clients"] = [{**line["clients"][0], "client": k} for k in range(10_000)]
    line["client_evaluations"] = {str(k): {"loss": 1.0} for k in range(10_000)}
    found = round_values(line)
    assert len(found) < 256 * 6 + 30
    assert found["train/clients"] == 10_000


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
    assert points == [10, 20, 25]
