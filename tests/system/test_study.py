"""`fedlora study` with its processes: tables of what was run, failures, a study that is killed."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fedlora.commands.study.execute as study_pool
from fedlora.commands.cli import main
from fedlora.commands.study.execute import execute
from fedlora.commands.study.load import load_study
from fedlora.commands.study.tables import over_cells, tables
from fedlora.runs.metrics_log import read_metrics
from support.study import (
    SHORT,
    made,  # noqa: F401
    overrides,
    study,
)

SHORT += ["--num_threads", "1"]  # beside other tests


def test_the_tables_hold_what_the_runs_measured(made: Path) -> None:
    found = load_study(str(made / "mine.yaml"))
    (table,) = tables(found, made / "out" / "runs")
    assert not table.missing
    of = {(row.cell, row.label): row for row in table.rows}
    for run in found.runs:
        lines = read_metrics(made / "out" / "runs" / run.directory)
        last = [line for line in lines if line.get("evaluation")][-1]
        row = of[(run.labels["ranks"],), run.labels["method"]]
        outcome = row.outcomes[run.seed]
        assert outcome.value == last["evaluation"]["loss"]
        rounds = [line for line in lines if line["event"] == "round"]
        assert outcome.up == sum(line["bytes_up"] for line in rounds)
        parameters = lines[0]["parameters"]
        assert outcome.traffic is not None
        assert math.isclose(
            outcome.traffic, (outcome.up + outcome.down) / (2 * 4 * parameters * 10 * 2)
        )
        assert outcome.with_base is not None
        assert math.isclose(outcome.with_base - outcome.traffic, 1 / 4)  # once, of 2 rounds x 2
    flora, fedit = of[("equal",), "flora"], of[("equal",), "fedit"]
    assert flora.difference is None
    assert fedit.difference is not None
    assert math.isclose(
        fedit.difference.mean, (sum(fedit.values) - sum(flora.values)) / 2, abs_tol=1e-12
    )
    assert over_cells(table, "fedit") == (fedit.difference, 1)  # the mixed cell has no fedit


def test_the_files_say_the_same(made: Path) -> None:
    page = (made / "out" / "table.md").read_text()
    with (made / "out" / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    with (made / "out" / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert len(runs) == 6
    equal = [float(x["value"]) for x in runs if (x["ranks"], x["method"]) == ("equal", "fedit")]
    (line,) = [x for x in summary if (x["cell"], x["label"]) == ("equal", "fedit")]
    assert math.isclose(float(line["mean"]), sum(equal) / 2)
    assert f"{sum(equal) / 2:.4f} ±" in page
    assert "fedit needs one rank for all clients" in page
    assert line["verdict"] in ("wins", "ties", "loses")


def test_runs_of_other_settings_are_not_mixed_in(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_study(str(made / "mine.yaml")).runs[0]
    file = made / "out" / "runs" / run.directory / "config.yaml"
    text = file.read_text()
    try:
        file.write_text(text.replace("learning_rate: 0.003", "learning_rate: 0.004"))
        arguments = ["study", str(made / "mine.yaml"), "--output_dir", str(made / "out")]
        assert main(arguments) == 2
    finally:
        file.write_text(text)
    complaint = capsys.readouterr().err
    assert "made with other settings" in complaint
    assert "learning_rate: 0.004 when it began, 0.003 now" in complaint


def test_a_run_whose_process_dies_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = study(tmp_path, seeds=[0], parts={"t": {"grid": {"method": ["flora", "ffa"]}}})
    found = load_study(str(path), overrides=overrides())
    heard: list[tuple[str, str]] = []
    started: list[subprocess.Popen[str]] = []

    def new_worker(*arguments: Any) -> Any:
        worker = make_worker(*arguments)
        started.append(worker.process)
        return worker

    def on_change(what: str, run: Any, message: Any) -> None:
        heard.append((what, run.keys["method"]))
        if what == "start" and run.keys["method"] == "flora":
            started[-1].kill()

    make_worker = study_pool._new_worker
    monkeypatch.setattr(study_pool, "_new_worker", new_worker)
    failed = execute(found.runs, tmp_path / "runs", processes=1, gpu=False, on_change=on_change)
    (why,) = failed.values()
    assert why.startswith("its process was killed by signal 9; see ")
    assert ("done", "ffa") in heard
    assert ("failed", "flora") in heard


def test_what_is_complete_is_not_run_again(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = made / "out" / "runs"
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")}
    monkeypatch.setattr(
        "fedlora.commands.study.execute._new_worker", lambda *_: pytest.fail("ran again")
    )
    path = str(made / "mine.yaml")
    assert main(["study", path, "--output_dir", str(made / "out")]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")}
    assert "two rules" in capsys.readouterr().out


@dataclass(frozen=True)
class Several:
    """A finished study: its file, its results, its exit code and what it printed."""

    path: Path
    out: Path
    code: int
    shown: str


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Several:
    """A study of runs of several kinds, one of which fails."""
    here = tmp_path_factory.mktemp("several")
    bad = {"model_name_or_path": str(here / "nothing")}
    kinds = {"together": {}, "alone": {"alone": 3}, "ada": {"trainer": "adalora"}, "bad": bad}
    part = {"keys": {"method": "flora", "client_ranks": 4}, "grid": {"who": kinds}}
    path, shown = study(here, seeds=[0], parts={"t": part}), io.StringIO()
    steps = [*SHORT[:3], "4", *SHORT[4:]]
    with redirect_stdout(shown):
        code = main(["study", str(path), "--output_dir", str(here / "out"), *steps])
    return Several(path, here / "out", code, shown.getvalue())


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_are_made(several: Several) -> None:
    assert several.code == 1
    assert "FAILED" in several.shown
    assert "nothing" in several.shown
    page = (several.out / "table.md").read_text()
    for kind in ("together", "alone", "ada"):
        assert f"`{kind}`" in page
    assert "bad, seed 0: not complete" in page


def test_a_client_alone_and_adalora_are_runs_too(several: Several) -> None:
    runs_of = several.out / "runs"
    loaded = load_study(str(several.path), overrides={**overrides(), "max_steps": 4})
    runs = {x.labels["who"]: x for x in loaded.runs if x.labels["who"] != "bad"}
    lines = {k: read_metrics(runs_of / run.directory) for k, run in runs.items()}
    clients = {k: next(x for x in v if x["event"] == "round")["clients"] for k, v in lines.items()}
    assert len(clients["together"]) == 10
    assert len(clients["alone"]) == 1
    assert clients["alone"][0]["num_examples"] == clients["together"][3]["num_examples"]
    assert all(x["metrics"]["mean_rank"] <= 4 for x in clients["ada"])
    assert (runs_of / runs["alone"].directory / "final" / "adapter_config.json").is_file()


@pytest.mark.slow
def test_a_killed_study_goes_on_with_the_run_it_was_in(tmp_path: Path) -> None:
    grid = {"method": ["flora"]}
    path = study(tmp_path, seeds=[0], parts={"t": {"grid": grid}})
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "fedlora", "study", str(path), "--output_dir", str(out)]
    arguments += ["--processes", "1", "--num_threads", "1"]
    arguments += ["--num_rounds", "12", "--max_steps", "2"]
    run = load_study(
        str(path), overrides={"num_rounds": 12, "max_steps": 2, "num_threads": 1}
    ).runs[0]  # fmt: skip
    metrics = out / "runs" / run.directory / "metrics.jsonl"
    process = subprocess.Popen(arguments, env={**os.environ}, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if metrics.is_file() and '"event": "round"' in metrics.read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert not (metrics.parent / "final").exists()
    assert main(arguments[3:]) == 0
    events = [json.loads(line)["event"] for line in metrics.read_text().splitlines()]
    assert "resume" in events
    assert events[-1] == "end"
    assert len([x for x in read_metrics(metrics.parent) if x["event"] == "round"]) == 12


def test_no_process_outlives_a_study_that_is_killed(tmp_path: Path) -> None:
    path = study(tmp_path, seeds=[0], parts={"t": {"grid": {"method": ["flora"]}}})
    arguments = [sys.executable, "-m", "fedlora", "study", str(path), "--processes", "1"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--num_threads", "1"]
    arguments += ["--num_rounds", "500", "--max_steps", "1"]
    process = subprocess.Popen(arguments, env={**os.environ}, stdout=subprocess.PIPE)
    until = time.monotonic() + 120
    while not list((tmp_path / "out" / "runs").glob("*/metrics.jsonl")):  # a worker runs it
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    workers = [pid for pid in study_workers() if parent_of(pid) == process.pid]
    process.kill()
    process.communicate()
    assert workers
    until = time.monotonic() + 60
    while study_workers() & set(workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not study_workers() & set(workers)


def study_workers() -> set[int]:
    """The processes on this machine that run studies for others; those that have ended are none."""
    found = set()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            if b"fedlora.commands.study.worker" in command.read_bytes():
                found.add(int(command.parent.name))
    return found


def parent_of(pid: int) -> int | None:
    """The process that started another; None where that has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return None


@pytest.mark.slow  # that each file's grid can be laid out, and that a study runs, is tested above
@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("flora-paper", ["--part", "table", "scaling_factor", "--where", "ranks=equal"]),
        ("many-short-rounds", []),
        ("rules", ["--where", "division=iid", "ranks=equal", "schedule=short", "--part", "table"]),
        ("heterogeneity", ["--part", "participation", "--where", "method=exact,zero_pad"]),
    ],
)
def test_a_shipped_study_in_short_form(name: str, where: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["study", name, *where, "--seeds", "0", "--output_dir", str(out), *SHORT]
    assert main([*arguments, "--eval_rounds", "0"]) == 0
    page = (out / "table.md").read_text()
    assert "missing" not in page
    with (out / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row["value"] and not row["missing"] for row in rows)
