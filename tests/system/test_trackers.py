"""`report_to`: what the libraries hold after a run, read from their own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlora.errors import InputError
from fedlora.runs import tracker_backends
from fedlora.runs.tracker_checks import check_trackers
from support.trackers import (
    EXPECTED,
    LOCAL,
    START,
    a_round,
    agree,
    apart,  # noqa: F401
    begin,
    configured,
    interrupted,
    report,
    tensorboard_scalars,
    trackio_logs,
    trackio_series,
    wandb_files,
    wandb_records,
    wandb_series,
    whole_run,
)


def test_wandb(tmp_path: Path) -> None:
    report(configured("wandb", run_name="first"), tmp_path / "out", whole_run())
    (path,) = wandb_files(tmp_path)
    agree(wandb_series(path, "round"), EXPECTED)
    agree(wandb_series(path, "train/global_step"), LOCAL)
    records = list(wandb_records(path))
    (run,) = (r.run for r in records if r.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("fedlora", "first")
    config = {
        update.key: json.loads(update.value_json)
        for r in records
        for update in (*r.config.update, *r.run.config.update)
    }
    assert config["client_ranks"] == [8, 4]
    assert config["model/num_parameters"] == 812_345
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.HasField("metric")}
    assert axes["eval/*"] == "round"
    assert axes["steps/*"] == "train/global_step"
    kept = json.loads((tmp_path / "out" / "trackers.json").read_text())
    assert kept == {"wandb": {"id": run.run_id}}
    ends = [r.exit.exit_code for r in records if r.HasField("exit")]
    assert ends == [0]


def test_project_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    report(configured("wandb"), tmp_path / "out", whole_run())
    (path,) = wandb_files(tmp_path)
    (run,) = (r.run for r in wandb_records(path) if r.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("elsewhere", "out")


def test_trackio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(configured("trackio"), tmp_path / "out", whole_run())
    found = trackio_series("out")
    agree(found, {**EXPECTED, **LOCAL})
    from trackio.sqlite_storage import SQLiteStorage

    config = SQLiteStorage.get_run_config("fedlora", "out")
    assert config is not None
    assert (config["client_ranks"], config["method"]) == ([8, 4], "exact")
    assert capsys.readouterr().out == ""  # it may be JSON lines that go there


def test_all_of_them(tmp_path: Path) -> None:
    config = configured("all", project="mine")
    assert check_trackers(config) == ["tensorboard", "wandb", "trackio"]
    report(config, tmp_path / "out", whole_run())
    agree(tensorboard_scalars(tmp_path / "out" / "runs"), EXPECTED)
    (path,) = wandb_files(tmp_path)
    agree(wandb_series(path, "round"), EXPECTED)
    assert trackio_logs("out", "mine")


def test_tensorboard_goes_on(tmp_path: Path) -> None:
    interrupted(configured("tensorboard"), tmp_path / "out")
    found = tensorboard_scalars(tmp_path / "out" / "runs")
    agree(found, EXPECTED)
    assert tensorboard_scalars(tmp_path / "out" / "runs" / "steps") == LOCAL
    accumulator = EventAccumulator(str(tmp_path / "out" / "runs")).Reload()
    assert [event.step for event in accumulator.Scalars("eval/loss")] == [0, 1, 2]  # none twice


def test_wandb_goes_on(tmp_path: Path) -> None:
    interrupted(configured("wandb"), tmp_path / "out")
    first, second = wandb_files(tmp_path)
    runs = [
        r.run.run_id
        for path in (first, second)
        for r in wandb_records(path)
        if r.WhichOneof("record_type") == "run"
    ]
    assert len(runs) == 2
    assert len(set(runs)) == 1
    agree(wandb_series(second, "round"), {"eval/loss": {2: 2.0}})
    agree(wandb_series(second, "train/global_step"), {"steps/client/0/loss": {22: 5.5, 24: 11.5}})
    assert [r.exit.exit_code for r in wandb_records(first) if r.HasField("exit")] == [1]


def test_trackio_goes_on(tmp_path: Path) -> None:
    interrupted(configured("trackio"), tmp_path / "out")
    agree(trackio_series("out"), {**EXPECTED, **LOCAL})


def test_trackio_does_not_go_on_in_another_run(tmp_path: Path) -> None:
    config = configured("trackio", run_name="same")
    report(config, tmp_path / "one", [begin(), START])
    report(config, tmp_path / "two", [begin(), START, a_round(1)])
    before = trackio_logs("same")
    report(config, tmp_path / "one", [begin(resumed_from=0), a_round(1)])
    assert trackio_logs("same") == before
    kept = json.loads((tmp_path / "one" / "trackers.json").read_text())["trackio"]
    assert kept["name"].startswith("same-")
    assert [row["step"] for row in trackio_logs(kept["name"])] == [1]


def test_one_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def broken(self: Any, values: Any, number: int) -> None:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(tracker_backends.Wandb, "round", broken)
    report(configured(["wandb", "tensorboard"]), tmp_path / "out", whole_run(), warn=told.append)
    assert told == ["report_to: wandb: no route to host; it is told nothing more"]
    agree(tensorboard_scalars(tmp_path / "out" / "runs"), EXPECTED)


def test_offline_nobody_needs_to_be_logged_in() -> None:
    assert check_trackers(configured(["wandb", "trackio"])) == ["wandb", "trackio"]


def test_nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "run", None)  # of a test before this one
    wandb.teardown()
    with pytest.raises(InputError, match="nobody is logged in; `wandb login`, or set WANDB_MODE="):
        check_trackers(configured("wandb"))
