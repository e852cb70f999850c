"""Study in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fedlora.commands.study.load import load_study
from fedlora.runs.metrics_log import read_metrics
from support.study import study


def test_a_killed_study_goes_on_with_the_run_it_was_in(tmp_path: Path) -> None:
    grid = {"method": ["flora"]}
    path = study(tmp_path, seeds=[0], parts={"t": {"grid": grid}})
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "fedlora", "study", str(path), "--output_dir", str(out)]
    arguments += ["--processes", "1", "--num_threads", "1"]
    arguments += ["--num_rounds", "4", "--max_steps", "2"]
    run = load_study(
        str(path), overrides={"num_rounds": 4, "max_steps": 2, "num_threads": 1}
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
    assert subprocess.run(arguments, env={**os.environ}, check=False).returncode == 0
    events = [json.loads(line)["event"] for line in metrics.read_text().splitlines()]
    assert "resume" in events
    assert events[-1] == "end"
    assert len([x for x in read_metrics(metrics.parent) if x["event"] == "round"]) == 4


def test_no_process_outlives_a_study_that_is_killed(tmp_path: Path) -> None:
    path = study(tmp_path, seeds=[0], parts={"t": {"grid": {"method": ["flora"]}}})
    arguments = [sys.executable, "-m", "fedlora", "study", str(path), "--processes", "1"]
    arguments += ["--output_dir", str(tmp_path / "out"), "--num_threads", "1"]
    arguments += ["--num_rounds", "500", "--max_steps", "1"]
    process = subprocess.Popen(arguments, env={**os.environ}, stdout=subprocess.PIPE)
    until = time.monotonic() + 120
    workers: list[int] = []
    while not workers and time.monotonic() < until:
        time.sleep(0.05)
        if list((tmp_path / "out" / "runs").glob("*/metrics.jsonl")):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            workers = [int(pid) for pid in children.split()]
    assert workers
    process.kill()
    process.communicate()
    while any(alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in workers)


def alive(pid: int) -> bool:
    try:
        return "fedlora.commands.study.worker" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False
