"""A made-up run as its events, and what the trackers' own files hold of it."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedlora.config.config import Config
from fedlora.runs.observers import observers

Event = dict[str, Any]


Series = dict[int, float]


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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
    return [
        *out,
        *(
            {"event": "client_end", "client": k, "metrics": {}, "outcome": "counted"}
            for k in (0, 1)
        ),
    ]


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
