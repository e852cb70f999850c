"""What TensorBoard's files hold after a run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.trackers import (
    EXPECTED,
    LOCAL,
    agree,
    apart,  # noqa: F401
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
