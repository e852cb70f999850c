"""`fedlora watch`: a run that goes on in another process, seen from its files."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

import pytest

from fedlora.commands.cli import main
from fedlora.commands.watch.client_table import clients
from fedlora.commands.watch.figures import time_left
from fedlora.commands.watch.view import status
from support.watch import START, a_round, look_at, shown, snapshot, written


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "run", [START, a_round(1), a_round(2)], progress=snapshot())
    look = look_at(path)
    assert look.alive
    lines = shown(look)
    text = "\n".join(lines)
    assert lines[0].startswith("exact · embedded · ")
    assert re.match(r"round 3 of 4, training ━+─+ +56%  1:4\d, 0:\d\d left$", lines[1])
    assert "clients           2 training, 1 done of 3 · 3,456 tokens/s" in lines
    assert re.search(r"train loss +3\.9 █[▁-█]+▁ 1\.9$", text, re.M)
    assert re.search(r"eval exact match +0\.0% ▁▅█ 20\.0%$", text, re.M)
    assert re.search(r"eval loss +8 █[▁-█]▁ 2$", text, re.M)
    assert "bytes             up 3.0 KB, down 6.0 KB, 9.0 KB in all" in lines
    row = r" +1 +7 training ━━─+ +5/20  1\.5000  2\.5000   1\.0 KB   2\.0 KB    2/2$"
    assert any(re.match(row, line) for line in lines)
    assert any(re.match(r" +0 +8 - +- +- +1\.5000", line) for line in lines)
    assert "in round 2        client 2: a NaN" in lines
    assert lines[-1] == "warning: client 2 is left out of round 2: a NaN"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("height", [12, 24, 40])
def test_every_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    lines = [START, a_round(1, 100), a_round(2, 100)]
    path = written(tmp_path / "run", lines, 100, snapshot(100, 5))
    short = os.path.relpath(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    text = "\n".join(shown(look_at(Path(short)), width, height))
    assert "round 3 of 4" in text
    if width >= 60 and height >= 24:
        assert re.search(r"^ +99 +\d training .*5/20", text, re.M)
        assert re.search(r"^ +and 95 more clients; 5 training, 95 done of 100", text, re.M)
        assert not re.search(r"^ +3 +\d ", text, re.M)  # it does not train now


def test_a_round_that_is_tried_again(tmp_path: Path) -> None:
    lines = [START, a_round(1), a_round(2, attempts=2)]
    look = look_at(written(tmp_path / "run", lines, progress=snapshot(attempt=3)))
    text = shown(look)
    assert "clients           2 training, 1 done of 3 · attempt 3 · 3,456 tokens/s" in text
    assert "in round 2        tried 2 times; client 2: a NaN" in text


def test_damage_is_said(tmp_path: Path) -> None:
    path = written(tmp_path / "run", [START, a_round(1)])
    (path / "config.yaml").write_text("[")
    assert "warning: config.yaml is damaged" in "\n".join(shown(look_at(path)))


def test_stopped(tmp_path: Path) -> None:
    left = snapshot(phase="stopped", problem="no space left on the device")
    path = written(tmp_path / "my run", [START, a_round(1)], progress=left)
    look = look_at(path)
    assert not look.alive
    text = status(look)
    assert re.match(
        r"not running since \d{4}-.* \(no space left on the device\); go on with:", text
    )
    assert text.endswith(f"fedlora run --resume '{path}'")
    assert clients(look)[0].state == "done"
    assert time_left(look) is None


def test_of_an_older_version(tmp_path: Path) -> None:
    """No begin line, no progress.json."""
    path = written(tmp_path / "a", [START, a_round(1), a_round(2)])
    lines = shown(look_at(path))
    assert re.match(r"round 2 of 4 ━+─+ +50%  0:20$", lines[1])
    assert lines[2].startswith("not running since")
    with (path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        look = look_at(path)
        assert (look.alive, status(look)) == (True, "running")
        assert time_left(look) == pytest.approx(20)
        assert "running" in shown(look)[1]


def test_just_begun(tmp_path: Path) -> None:
    first = snapshot(phase="loading", round=0, finished=0, clients={}, losses=[], warnings=[])
    look = look_at(written(tmp_path / "run", [], progress=first))
    lines = shown(look)
    assert lines[1].startswith("round 0 of 4, loading")
    assert sum(line.lstrip()[:1].isdigit() for line in lines) == 3


def test_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "run", [START, a_round(1), a_round(2)], progress=snapshot())
    assert main(["watch", str(path), "--once"]) == 0
    out = capsys.readouterr().out
    assert "round 3 of 4, training" in out
    assert "\x1b" not in out


def test_waiting_is_not_for_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "none"), "--once"]) == 2
    assert "none: no run there; give the output directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give the output directory of one run"),
        (["a", "b"], "give the output directory of one run"),
        (["a", "--frequency", "3"], "give the output directory of one run"),
        (["a", "--interval", "often"], "--interval often: expected seconds"),
        (["a", "--interval", "0"], "--interval 0: expected seconds, more than 0"),
        (["FULL"], "no run; there is no config.yaml"),
        (["FILE"], "a file; give the output directory of a run"),
    ],
)
def test_mistakes(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FULL").mkdir()
    for file in (tmp_path / "FULL" / "notes.txt", tmp_path / "FILE"):
        file.touch()
    known = [str(tmp_path / x) if x in ("FULL", "FILE") else x for x in arguments]
    assert main(["watch", *known]) == 2
    assert message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--help"]) == 0
    assert "--interval SECONDS" in capsys.readouterr().out
