"""Reading `metrics.jsonl`: a round that was run again counts once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.runs.metrics_log import read_metrics


def log(directory: Path, *lines: Any) -> Path:
    text = "".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines)
    (directory / "metrics.jsonl").write_text(text, encoding="utf-8")
    return directory


def line(event: str, number: int, **values: Any) -> dict[str, Any]:
    return {"event": event, "round": number, **values}


def test_lines_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    lines = [line("start", 0), line("round", 1, loss=2.0), line("round", 2, loss=1.0)]
    assert read_metrics(log(tmp_path, *lines)) == lines
    assert read_metrics(str(tmp_path)) == lines


def test_the_half_written_last_line_of_a_killed_run_is_passed_over(tmp_path: Path) -> None:
    assert read_metrics(log(tmp_path, line("start", 0), '{"event": "ro')) == [line("start", 0)]


def test_what_a_resumed_run_does_again_counts_once(tmp_path: Path) -> None:
    before = [line("round", n, loss=9.0) for n in (1, 2, 3)]
    again = line("round", 2, loss=1.0)
    kept = read_metrics(log(tmp_path, *before, line("resume", 1), again))
    assert kept == [before[0], again]


def test_resuming_after_the_last_round_forgets_nothing(tmp_path: Path) -> None:
    lines = [line("start", 0), line("round", 1)]
    assert read_metrics(log(tmp_path, *lines, line("resume", 1))) == lines


def test_the_last_of_each_measure_and_model_is_kept(tmp_path: Path) -> None:
    old = line("eval", 2, name="mmlu", model="global", value=0.1)
    other_model = line("eval", 2, name="mmlu", model="base", value=0.2)
    other_measure = line("eval", 2, name="judge", model="global", value=0.3)
    new = old | {"value": 0.4}
    kept = read_metrics(log(tmp_path, old, other_model, other_measure, new))
    assert kept == [new, other_model, other_measure]


def test_a_directory_without_a_log(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path)
