"""`fedlora status`: runs that go on, are complete, were interrupted, or are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.cli import main
from fedlora.commands.status import best_round, described, result_of
from support.watch import START, a_round, look_at, snapshot, written


def status(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """What a person and a program are told."""
    assert main(["status", str(path)]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 + len(str(path))
    assert main(["status", str(path), "--json"]) == 0
    return said, json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = [a_round(1), a_round(2, attempts=2)]
    path = written(tmp_path / "run", [START, *rounds], progress=snapshot(attempt=3))
    for name in ("round-1", "round-2", "round-3", "round-2.damaged"):
        (path / name).mkdir()
    for name in ("round-1", "round-2"):  # a state alone is no result
        (path / name / "adapter_config.json").write_text("{}")
    said, told = status(path, capsys)
    assert "\nrunning: training, round 3 of 4, attempt 3, 1:40, 0:" in said
    assert f"\nresult  {path / 'round-2'} (so far)\n" in said
    assert "\nbytes   up 3.0 KB, down 6.0 KB; in round 2: up 1.5 KB, down 3.0 KB\n" in said
    assert "\nagain   round 2 (2 attempts)\n" in said
    row = next(line for line in said.splitlines() if line.lstrip().startswith("2 "))
    assert row.rstrip().endswith("  2: a NaN")
    assert (told["state"], told["round"], told["attempt"]) == ("running", 3, 3)
    assert told["rounds"][1] == {
        "round": 2,
        "attempts": 2,
        "asked": 3,
        "counted": 2,
        "failed": 1,
        "late": 0,
        "unneeded": 0,
        "bytes_up": 1500,
        "bytes_down": 3000,
    }
    assert [c["counted"] for c in told["clients"]] == [2, 2, 0]
    assert (told["clients"][2]["reason"], told["clients"][2]["outcome"]) == ("a NaN", "failed")


def test_a_run_that_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end = {"event": "end", "round": 4, "final": 3, "best": 3}
    lines = [START, *(a_round(k) for k in range(1, 5)), end]
    path = written(tmp_path / "run", lines, progress=snapshot(phase="ended"), ended=True)
    said, told = status(path, capsys)
    assert "\nended: round 4 of 4, 1:40\n" in said
    assert f"\nresult  {path / 'final'} (round 3)\n" in said
    assert "attempt" not in said
    assert (told["state"], told["result_round"], told["seconds_left"]) == ("ended", 3, None)


def test_a_run_that_was_stopped_or_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = snapshot(phase="stopped", problem="interrupted")
    path = written(tmp_path / "stopped", [START, a_round(1)], progress=stopped)
    said, told = status(path, capsys)
    assert "\nstopped: round 1 of 4, " in said
    assert f"\ngo on with: fedlora run --resume {path}\n" in said
    assert (told["state"], told["result"]) == ("stopped", None)
    failed = snapshot(phase="stopped", problem="round 2: 1 of 3 clients count")
    path = written(tmp_path / "failed", [START, a_round(1)], progress=failed)
    said, told = status(path, capsys)
    assert "\nround 2: 1 of 3 clients count\n" in said
    assert (told["state"], told["problem"]) == ("failed", "round 2: 1 of 3 clients count")


def test_a_damaged_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "run", [START, a_round(1)])
    (path / "config.yaml").write_text("a: [")
    with (path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"event": "round", "round": 2, "clients": 7}\n\xff\n')
    said, told = status(path, capsys)
    assert said.count("\ndamaged ") == 2
    assert "stopped: round 2 of ?" in said
    assert len(told["damage"]) == 2
    assert told["num_rounds"] == 0
    assert told["rounds"][1]["asked"] == 0


def test_many_clients_are_cut_off_in_a_table_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "run", [START, a_round(1, 50)], 50)
    said, told = status(path, capsys)
    assert "and 10 more clients" in said
    assert len(told["clients"]) == 50


def test_names_of_clients_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clients = [{"client": k, "name": f"hospital {k}", "rank": 4, "rows": 1200} for k in range(3)]
    begin = {"event": "begin", "round": 0, "clients": clients}
    path = written(tmp_path / "run", [begin, START, a_round(1)])
    said, told = status(path, capsys)
    assert "hospital 1" in said
    assert "1,200" in said
    assert told["clients"][1]["name"] == "hospital 1"


def test_the_best_round_is_that_of_the_deciding_metric(tmp_path: Path) -> None:
    path = written(tmp_path / "run", [START, a_round(1), a_round(2), a_round(3, evaluation={})])
    run = look_at(path).run
    run.config["greater_is_better"] = True
    assert (best_round(run).round, best_round(run).value) == (2, 0.2)
    run.config.pop("metric_for_best_model")
    run.config["greater_is_better"] = False
    assert (best_round(run).round, best_round(run).value) == (2, 2.0)


def test_a_run_before_its_first_round_has_no_result(tmp_path: Path) -> None:
    look = look_at(written(tmp_path / "run", [START]))
    assert result_of(look) is None
    assert described(look)["best_round"] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "status: give the output directory of one run"),
        (["a", "b"], "status: give the output directory of one run"),
        (["--once"], "status: give the output directory of one run"),
        (["none"], "none: no run there; give the output directory"),
        (["file"], "file: a file; give the output directory"),
        (["full"], "full: no run; there is no config.yaml"),
    ],
)
def test_mistakes(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    for file in ("file", "full/notes.txt"):
        Path(file).touch()
    assert main(["status", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"fedlora: {says}")
    assert captured.err.count("\n") == 1
