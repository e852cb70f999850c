"""`report_to`: what the libraries hold after a run, and what happens when they fail."""

from __future__ import annotations

import json
import math
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.runs import trackers
from fedlora.runs.observers import observers
from fedlora.runs.progress import read_progress
from fedlora.runs.trackers import check_trackers, longest, round_values

Event = dict[str, Any]


Series = dict[int, float]


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No account, no network, nothing of the user's."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "TRACKIO_", "TENSORBOARD_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    import trackio.sqlite_storage
    import trackio.utils
    import wandb

    for module in (trackio, trackio.utils, trackio.sqlite_storage):
        if hasattr(module, "TRACKIO_DIR"):  # read from the environment once, at import
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    yield
    wandb.teardown()


def configured(report_to: Any, **more: Any) -> Config:
    return Config(report_to=report_to, num_rounds=2, client_ranks=[8, 4], **more)


def begin(resumed_from: int | None = None) -> Event:
    return {
        "event": "begin",
        "resumed_from": resumed_from,
        "model": "tiny",
        "method": "exact",
        "num_rounds": 2,
        "ranks": [8, 4],
        "parameters": 812_345,
    }


START: Event = {"event": "start", "round": 0, "evaluation": {"loss": 4.0, "exact_match": 0.0}}


def a_round(number: int, steps: int = 12) -> Event:
    """A line of `metrics.jsonl` with all that the contract knows."""
    return {
        "event": "round",
        "round": number,
        "clients": [
            {
                "client": k,
                "rank": rank,
                "num_examples": 10,
                "weight": weight,
                "bytes_down": 7,
                "bytes_up": 5,
                "metrics": {"loss": k + 1.0 / number, "steps": steps, "tokens": 100},
                "rejected": "" if weight else "a NaN",
            }
            for k, (rank, weight) in enumerate([(8, 0.75), (4, 0.25), (4, 0.0)])
        ],
        "aggregation_error": 1e-7,
        "truncation_error": None,
        "update_norm": 1.5,
        "global_rank": 12,
        "layers": {"q_proj": {"error": 1e-7, "norm": 0.3}},
        "bytes_up": 15,
        "bytes_down": 21,
        "evaluation": {"loss": 4.0 - number, "exact_match": number / 10, "per_class": {"a": {}}},
        "client_evaluations": {"0": {"loss": 3.0}, "1": {"loss": 2.0}},
        "personal_evaluations": {"0": {"loss": 1.0}},
        "general_evaluation": {"loss": 5.0, "perplexity": 148.4},
        "privacy": {"epsilon": 1.2, "delta": 1e-5},
        "seconds": {"train": 1.0, "aggregate": 0.1, "evaluate": 0.5},
    }


def steps_of(number: int, steps: int = 12) -> list[Event]:
    out: list[Event] = [{"event": "round_begin", "round": number, "clients": [0, 1]}]
    out += [{"event": "client_begin", "client": k, "rank": 8} for k in (0, 1)]
    for step in range(1, steps + 1):
        for k in (0, 1):
            loss = float(step) if k == 0 else None
            out.append(
                {
                    "event": "step",
                    "client": k,
                    "step": step,
                    "steps": steps,
                    "loss": loss,
                    "tokens": 9,
                }
            )
    return [*out, *({"event": "client_end", "client": k, "metrics": {}} for k in (0, 1))]


def whole_run() -> list[Event]:
    rounds = [event for n in (1, 2) for event in (*steps_of(n), a_round(n))]
    return [begin(), START, *rounds, {"event": "end", "round": 2, "final": 2, "best": 2}]


def report(config: Config, out: Path, events: list[Event], **more: Any) -> None:
    out.mkdir(exist_ok=True)
    with observers(config, out, **more) as observe:
        for event in events:
            observe(event)


def tensorboard_scalars(where: Path) -> dict[str, Series]:
    found = EventAccumulator(str(where), size_guidance={"scalars": 0}).Reload()
    return {
        tag: {event.step: event.value for event in found.Scalars(tag)}
        for tag in found.Tags()["scalars"]
    }


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a run's file: a log as LevelDB's (blocks of 32 KiB), of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole of a record, or the last part
            yield Record.FromString(whole)
            whole = b""


def wandb_files(tmp_path: Path) -> list[Path]:
    import wandb

    wandb.teardown()  # its process writes until it ends
    return sorted(tmp_path.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_mtime)


def wandb_series(path: Path, axis: str) -> dict[str, Series]:
    out: dict[str, Series] = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            row = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for key, value in row.items():
                if axis in row and not key.startswith("_"):
                    out.setdefault(key, {})[int(row[axis])] = value
    return out


def trackio_logs(run: str, project: str = "fedlora") -> list[dict[str, Any]]:
    from trackio.sqlite_storage import SQLiteStorage

    logs: list[dict[str, Any]] = SQLiteStorage.get_logs(project, run, max_points=None)
    return logs


def trackio_series(run: str) -> dict[str, Series]:
    out: dict[str, Series] = {}
    for row in trackio_logs(run):
        for key, value in row.items():
            if isinstance(value, int | float) and key != "step":
                out.setdefault(key, {})[row["step"]] = value
    return out


EXPECTED: dict[str, Series] = {
    "eval/loss": {0: 4.0, 1: 3.0, 2: 2.0},
    "eval/exact_match": {0: 0.0, 1: 0.1, 2: 0.2},
    "train/loss": {1: 1.25, 2: 0.75},  # by weight; the one that was rejected has none
    "train/bytes_up": {1: 15, 2: 15},
    "train/bytes_down": {1: 21, 2: 21},
    "train/update_norm": {1: 1.5, 2: 1.5},
    "train/global_rank": {1: 12, 2: 12},
    "train/aggregation_error": {1: 1e-7, 2: 1e-7},
    "train/rejected": {1: 1, 2: 1},
    "seconds/evaluate": {1: 0.5, 2: 0.5},
    "general/loss": {1: 5.0, 2: 5.0},
    "privacy/epsilon": {1: 1.2, 2: 1.2},
    "client/0/loss": {1: 1.0, 2: 0.5},
    "client/1/loss": {1: 2.0, 2: 1.5},
    "client/1/eval_loss": {1: 2.0, 2: 2.0},
    "client/0/personal_loss": {1: 1.0, 2: 1.0},
    "client/0/rank": {1: 8, 2: 8},
}


LOCAL: dict[str, Series] = {"steps/client/0/loss": {10: 5.5, 12: 11.5, 22: 5.5, 24: 11.5}}
"""Means since the last point: after ten steps, and at the end of a round."""


def agree(found: dict[str, Series], expected: dict[str, Series]) -> None:
    for name, series in expected.items():
        assert name in found, f"{name} is none of {sorted(found)}"
        assert found[name] == pytest.approx(series, rel=1e-6), name


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


def break_off(config: Config, out: Path, events: list[Event], error: BaseException) -> None:
    """A run that fails after these events."""
    with observers(config, out) as observe:
        for event in events:
            observe(event)
        raise error


def interrupted(config: Config, out: Path) -> None:
    """Killed in round 2, and resumed after round 1."""
    out.mkdir()
    damaged = {**a_round(2), "update_norm": 99.0}  # as its files turn out to be
    events = [begin(), START, *steps_of(1), a_round(1), *steps_of(2), damaged]
    with pytest.raises(KeyboardInterrupt):
        break_off(config, out, events, KeyboardInterrupt())
    lines = [START, a_round(1), damaged]
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    time.sleep(1.1)  # tensorboard's files have names by the second
    rest = [*steps_of(2), a_round(2), {"event": "end", "round": 2, "final": 2, "best": 2}]
    report(config, out, [begin(resumed_from=1), *rest])


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


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("none", []),
        (["none"], []),
        ([], []),
        (["tensorboard", "tensorboard"], ["tensorboard"]),
        (["wandb", "trackio"], ["wandb", "trackio"]),
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
    real = trackers.find_spec
    monkeypatch.setattr(trackers, "find_spec", lambda n: None if n == "wandb" else real(n))
    with pytest.raises(InputError, match=r"wandb is not installed; pip install 'fedlora\[tracke"):
        check_trackers(configured("wandb"))
    assert check_trackers(configured("all")) == ["tensorboard", "trackio"]


def test_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match="trackio"):
        check_trackers(configured("trackio"))


def test_nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import wandb

    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()
    with pytest.raises(InputError, match="nobody is logged in; `wandb login`, or set WANDB_MODE="):
        check_trackers(configured("wandb"))


def test_one_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def broken(self: Any, values: Any, number: int) -> None:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(trackers._Wandb, "round", broken)
    report(configured(["wandb", "tensorboard"]), tmp_path / "out", whole_run(), warn=told.append)
    assert told == ["report_to: wandb: no route to host; it is told nothing more"]
    agree(tensorboard_scalars(tmp_path / "out" / "runs"), EXPECTED)


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

    class Watched(trackers._TensorBoard):
        def close(self, succeeded: bool) -> None:
            closed.append(succeeded)
            super().close(succeeded)

    monkeypatch.setitem(trackers._OPEN, "tensorboard", Watched)
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
    assert longest(a_round(1, steps=7)) == 7
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
    monkeypatch.setitem(trackers._OPEN, "tensorboard", lambda opening: tracker)
    steps = [
        {"event": "step", "client": 0, "step": k, "steps": 25, "loss": 1.0, "tokens": 9}
        for k in range(1, 26)
    ]
    report(configured("tensorboard"), tmp_path / "out", [begin(), START, *steps])
    assert points == [10, 20, 25]
