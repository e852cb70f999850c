"""`fedlora watch` beside a run of another process: in a terminal, in a log, and after a kill."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.look import Look, Reader
from fedlora.commands.watch.client_table import clients
from fedlora.commands.watch.figures import time_left
from fedlora.commands.watch.view import status
from support.watch import START, Line, a_round, look_at, shown, snapshot, written

END: Line = {"event": "end", "round": 4, "final": 4, "best": 3}


def dead_pid() -> int:
    """Of a process that has been."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_ended(tmp_path: Path) -> None:
    rounds = [a_round(n) for n in (1, 2, 3, 4)]
    left = snapshot(phase="ended", pid=dead_pid(), round=4, finished=4)
    path = written(tmp_path / "run", [START, *rounds, END], 3, left, ended=True)
    look = look_at(path)
    lines = shown(look)
    assert re.match(r"round 4 of 4 ━+ +100%  1:40$", lines[1])
    assert lines[2] == "ended after round 4; best: round 3; final/ holds round 4"
    assert any(re.match(r" +2 +6 rejected .*20/20  2\.7500  3\.0000", line) for line in lines)


def test_killed(tmp_path: Path) -> None:
    path = written(tmp_path / "a", [START], progress=snapshot(pid=dead_pid()))
    assert status(look_at(path)).startswith("not running since")
    # The process that has its number now is another one.
    path = written(tmp_path / "b", [START], progress=snapshot(updated=time.time() - 3600))
    assert status(look_at(path)).startswith("not running since")


ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "COLUMNS", "LINES")},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TERM": "xterm",
}


def _as_in_a_shell() -> None:
    """Ctrl-C is heard, also where the tests run in the background and ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedlora", *arguments]
    return subprocess.Popen(command, text=True, env=ENVIRONMENT, preexec_fn=_as_in_a_shell, **more)


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
    short += ("--eval_exact_match", "false", "--metric_for_best_model", "eval_loss")
    run = started(
        *("run", "--num_rounds", "400", *short, "--num_threads", "1", "--output_dir", str(path)),
        stdout=subprocess.DEVNULL,
    )
    looks: list[Look] = []
    reader = Reader(path)

    def far_enough() -> bool:
        assert run.poll() is None
        look = reader.look()
        if look is None or not look.progress:  # its directory is there before it says anything
            return False
        looks.append(look)
        trained = any(x.state == "training" and x.loss for x in clients(looks[-1]).values())
        return len(looks) > 1 and looks[-1].finished >= 2 and trained

    try:
        until(far_enough, 400)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    said, _ = watcher.communicate(timeout=120)
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
