"""`fedlora watch`: a run that goes on in another process, seen from its files."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fedlora.commands.cli import main
from fedlora.commands.watch.view import (
    Look,
    Reader,
    clients,
    duration,
    sparkline,
    status,
    time_left,
    view,
)
from fedlora.runs.progress import PROGRESS

Line = dict[str, Any]


def a_round(number: int, count: int = 3, **more: Any) -> Line:
    return {
        "event": "round",
        "round": number,
        "clients": [
            {
                "client": k,
                "rank": 8 - k % 8,
                "num_examples": 10,
                "weight": 0.3,
                "bytes_down": 1000,
                "bytes_up": 500,
                "metrics": {"loss": 3.0 / number + k, "steps": 20, "tokens": 100},
                "rejected": "a NaN" if k == 2 else "",
            }
            for k in range(count)
        ],
        "bytes_up": 500 * count,
        "bytes_down": 1000 * count,
        "evaluation": {"loss": 4.0 / number, "exact_match": 0.1 * number},
        "seconds": {"train": 8.0, "aggregate": 1.0, "evaluate": 1.0},
        **more,
    }


START: Line = {"event": "start", "round": 0, "evaluation": {"loss": 8.0, "exact_match": 0.0}}
END: Line = {"event": "end", "round": 4, "final": 4, "best": 3}


def dead_pid() -> int:
    """Of a process that has been."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def written(
    path: Path,
    lines: list[Line],
    count: int = 3,
    progress: dict[str, Any] | None = None,
    ended: bool = False,
) -> Path:
    """A run's directory."""
    path.mkdir()
    config = {
        "method": "exact",
        "model_name_or_path": "embedded",
        "num_rounds": 4,
        "client_ranks": [8 - k % 8 for k in range(count)],
        "metric_for_best_model": "eval_exact_match",
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    (path / ".lock").touch()
    if lines:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / "metrics.jsonl").write_text(text)
    if progress is not None:
        (path / PROGRESS).write_text(json.dumps(progress))
    if ended:
        (path / "final").mkdir()
    return path


def snapshot(count: int = 3, training: int = 2, **more: Any) -> dict[str, Any]:
    """Of a run of this process, in its third round."""
    now = time.time()
    states = {
        k: {"rank": 8 - k % 8, "state": "training", "step": 5, "steps": 20, "loss": 1.5}
        for k in range(count - training, count)
    }
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": now - 100,
        "updated": now,
        "phase": "training",
        "problem": None,
        "round": 3,
        "num_rounds": 4,
        "finished": 2,
        "round_began": now - 4,
        "seconds_per_round": 12.0,
        "share": 0.25,
        "tokens_per_second": 3456.0,
        "counts": {
            "selected": count,
            "waiting": 0,
            "training": training,
            "done": count - training,
            "rejected": 0,
        },
        "clients": states,
        "losses": [[x / 10, 4.0 - x / 10] for x in range(1, 22)],
        "warnings": ["client 2 is left out of round 2: a NaN"],
        **more,
    }


def look_at(path: Path) -> Look:
    found = Reader(path).look()
    assert found is not None
    return found


def shown(look: Look, width: int = 80, height: int = 24) -> list[str]:
    """The view as it stands in a terminal of that size."""
    console = Console(file=io.StringIO(), width=width, _environ={})
    console.print(view(look, width, height))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= height
    return [line.rstrip() for line in lines]


# --- figures ---


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (75.4, "1:15"), (3675, "1:01:15"), (90_000, "1 d 1:00:00"), (-3, "0:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sparkline() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([(1, 5.0)], 10) == "▅"
    assert sparkline([(n, float(n)) for n in range(8)], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([(n, float(n)) for n in range(800)], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([(n, 1.0) for n in range(3)], 8) == "▅▅▅"


def test_time_left(tmp_path: Path) -> None:
    path = written(tmp_path / "run", [START, a_round(1), a_round(2)], progress=snapshot())
    left = time_left(look_at(path))
    assert left == pytest.approx(2 * 12 - 4, abs=2)  # two rounds, less what is behind in this one
    first = snapshot(round=1, finished=0, seconds_per_round=None)
    path = written(tmp_path / "first", [START], progress=first)
    assert time_left(look_at(path)) == pytest.approx(4 * 16 - 4, abs=4)  # a quarter took 4 s
    unknown = snapshot(round=1, finished=0, seconds_per_round=None, share=0.0)
    assert time_left(look_at(written(tmp_path / "0", [START], progress=unknown))) is None


# --- the view ---


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
    row = r" +1 +7 training ━━─+ +5/20  1\.5000  2\.5000   1\.0 KB   2\.0 KB$"
    assert any(re.match(row, line) for line in lines)
    assert any(re.match(r" +0 +8 - +- +- +1\.5000", line) for line in lines)
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


def test_ended(tmp_path: Path) -> None:
    rounds = [a_round(n) for n in (1, 2, 3, 4)]
    left = snapshot(phase="ended", pid=dead_pid(), round=4, finished=4)
    path = written(tmp_path / "run", [START, *rounds, END], 3, left, ended=True)
    look = look_at(path)
    lines = shown(look)
    assert re.match(r"round 4 of 4 ━+ +100%  1:40$", lines[1])
    assert lines[2] == "ended after round 4; best: round 3; final/ holds round 4"
    assert any(re.match(r" +2 +6 rejected .*20/20  2\.7500  3\.0000", line) for line in lines)


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


def test_killed(tmp_path: Path) -> None:
    path = written(tmp_path / "a", [START], progress=snapshot(pid=dead_pid()))
    assert status(look_at(path)).startswith("not running since")
    # The process that has its number now is another one.
    path = written(tmp_path / "b", [START], progress=snapshot(updated=time.time() - 3600))
    assert status(look_at(path)).startswith("not running since")


def test_held_up(tmp_path: Path) -> None:
    """It says nothing, but has the lock."""
    path = written(tmp_path / "a", [START], progress=snapshot(updated=time.time() - 3600))
    with (path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert look_at(path).alive


def test_on_another_machine(tmp_path: Path) -> None:
    there = {"host": "elsewhere", "pid": 1}
    path = written(tmp_path / "a", [START], progress=snapshot(**there))
    assert look_at(path).alive
    old = snapshot(**there, updated=time.time() - 3600)
    assert not look_at(written(tmp_path / "b", [START], progress=old)).alive


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


def test_a_run_that_was_resumed(tmp_path: Path) -> None:
    lines = [START, a_round(1), a_round(2), a_round(3), {"event": "resume", "round": 1}]
    path = written(tmp_path / "run", lines, progress=snapshot(round=2, finished=1))
    reader = Reader(path)
    look = reader.look()
    assert look is not None
    assert look.finished == 1
    with (path / "metrics.jsonl").open("a") as out:
        out.write(json.dumps(a_round(2)) + '\n{"event": "rou')
    look = reader.look()
    assert look is not None
    assert look.finished == 2


# --- the verb ---


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


ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "COLUMNS", "LINES")},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TERM": "xterm",
}


def started(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedlora", *arguments]
    return subprocess.Popen(command, text=True, env=ENVIRONMENT, **more)


def until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Look], str]]:
    """A real run, what was seen of it until it was killed, and what a watcher in a log said."""
    path = tmp_path_factory.mktemp("runs") / "run"
    watcher = started("watch", str(path), "--interval", "0.1", stdout=subprocess.PIPE)
    short = ("--max_steps", "10", "--max_eval_samples", "8", "--client_ranks", "8", "4")
    run = started(
        *("run", "--num_rounds", "400", *short, "--num_threads", "1", "--output_dir", str(path)),
        stdout=subprocess.DEVNULL,
    )
    looks: list[Look] = []
    reader = Reader(path)

    def far_enough() -> bool:
        assert run.poll() is None
        if (look := reader.look()) is None:
            return False
        looks.append(look)
        trained = any(x.state == "training" and x.loss for x in clients(looks[-1]).values())
        return len(looks) > 1 and looks[-1].finished >= 2 and trained

    try:
        until(far_enough, 120)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    said, _ = watcher.communicate(timeout=60)
    assert watcher.returncode == 0
    yield path, looks, said
    shutil.rmtree(path)


def test_a_real_run(killed: tuple[Path, list[Look], str]) -> None:
    path, looks, _ = killed
    assert all(look.alive for look in looks)
    assert {look.progress.get("phase") for look in looks} & {"evaluating", "training"}
    assert any(time_left(look) for look in looks)
    text = "\n".join(shown(looks[-1]))
    assert "exact · embedded" in text
    assert re.search(r"eval loss +[\d.]+ [▁-█]+ [\d.]+$", text, re.M)
    gone = look_at(path)
    assert not gone.alive
    assert f"fedlora run --resume {path}" in status(gone)


def test_lines_for_a_log(killed: tuple[Path, list[Look], str]) -> None:
    path, _, said = killed
    lines = said.splitlines()
    assert lines[0] == f"waiting for {path}: no run there yet"
    assert "\x1b" not in said
    rounds = [line for line in lines if re.match(r"round \d+ of 400: loss ", line)]
    assert len(rounds) >= 1
    assert re.fullmatch(r".*up [\d.]+ .B, down [\d.]+ .?B, [\d.]+ s", rounds[-1])
    assert lines[-2].startswith("not running since ")
    assert lines[-1] == f"fedlora run --resume {path}"


def in_terminal(path: Path, stop: Any = None) -> tuple[int, str]:
    """`fedlora watch` in a terminal of 80 columns and 24 lines: its exit code and its output."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = started(
        *("watch", str(path), "--interval", "0.1"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        text += piece
        if stop and stop in text.decode(errors="replace"):
            process.send_signal(signal.SIGINT)
            stop = None
    os.close(ours)
    return process.wait(timeout=30), text.decode()


ALTERNATE, BACK = "\x1b[?1049h", "\x1b[?1049l"


def test_in_a_terminal(killed: tuple[Path, list[Look], str]) -> None:
    code, text = in_terminal(killed[0])
    assert code == 0
    before, _, after = text.rpartition(BACK)
    assert ALTERNATE in before
    assert "fedlora run --resume" in after  # it stays when the view is gone


def test_leaving_is_no_failure(tmp_path: Path) -> None:
    path = written(tmp_path / "run", [START, a_round(1), a_round(2)], progress=snapshot())
    code, text = in_terminal(path, stop="tokens/s")
    assert code == 0
    assert BACK in text
    assert "Traceback" not in text
