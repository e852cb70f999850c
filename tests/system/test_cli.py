"""`fedlora` as a shell starts it: pipes, terminals and signals."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.cli import main
from fedlora.config.yaml_file import read_yaml
from fedlora.runs.metrics_log import read_metrics
from support.script import (
    FEDLORA,
    _offline,  # noqa: F401
    _signals_as_they_were,  # noqa: F401
    environment,
    here,  # noqa: F401
    run_script,
    site,  # noqa: F401
)


def test_config_to_a_file_to_a_run(
    here: Path, small_run: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """`fedlora config > my.yaml`, then `fedlora run my.yaml`, through the installed script."""
    keys = ["--model_name_or_path", small_run["model_name_or_path"]]
    keys += ["--train_file", small_run["train_file"], "--eval_file", small_run["eval_file"]]
    keys += ["--client_ranks", "4", "4", "2", "2", "--lora_target_modules", "q_proj", "v_proj"]
    printed = run_script("config", *keys, cwd=here)
    assert (printed.returncode, printed.stderr) == (0, "")
    (here / "my.yaml").write_text(printed.stdout)
    more = ["--num_rounds", "2", "--max_steps=1", "--num_threads", "1", "--output_dir", "out"]
    done = run_script("run", "my.yaml", *more, cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert "4 target modules" in lines[0]
    assert "4 clients, ranks 4 4 2 2, rows 24 16 12 8; 10 rows to evaluate on" in lines[1]
    assert lines[2].startswith("base in float32: layers 32 wide")
    assert lines[2].endswith("; clients in one pass: 4")
    assert [line.split()[0] for line in lines[3:7]] == ["round", "0", "1", "2"]
    assert lines[7].startswith("ended after round 2; best: round ")
    assert lines[8] == "final adapter: out/final  (PeftModel.from_pretrained loads it)"
    assert len(lines) == 9
    config = read_yaml(here / "out" / "config.yaml")
    assert config["lora_target_modules"] == ["q_proj", "v_proj"]
    assert (config["num_rounds"], config["max_steps"]) == (2, 1)


LONG = 10  # rounds


def long_run(site: Path, out: str) -> list[str]:
    """Ten rounds of a quarter of a second or more, to be interrupted in one of the first."""
    keys = [
        "--num_rounds",
        str(LONG),
        "--max_steps",
        "10",
        "--eval_file",
        "none",
        "--lora_target_modules",
        "q_proj",
    ]
    return [FEDLORA, "run", "my.yaml", *keys, "--output_dir", out]


def assert_resumable(message: str, out: str, site: Path) -> None:
    """The message names a command that ends the run."""
    said = message.strip().splitlines()[-1]
    head, _, command = said.partition("Go on with: ")
    assert head == "stopped; finished rounds are saved. "
    argv = shlex.split(command)
    assert argv == ["fedlora", "run", "--resume", out]
    begun = [line["round"] for line in read_metrics(site / out) if line["event"] == "round"]
    assert begun
    assert begun[-1] < LONG
    assert main(argv[1:]) == 0
    rounds = [line["round"] for line in read_metrics(site / out) if line["event"] == "round"]
    assert rounds == list(range(1, LONG + 1))
    assert (site / out / "final" / "adapter_model.safetensors").is_file()


def test_terminated(site: Path) -> None:
    out = "my $out"  # the command must survive a shell
    argv = [*long_run(site, out), "--json"]
    with subprocess.Popen(
        argv, cwd=site, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        for line in process.stdout:
            if json.loads(line)["event"] == "round":
                process.send_signal(signal.SIGTERM)
                break
        rest, message = process.communicate()
    assert process.returncode == 130, message
    assert {json.loads(line)["event"] for line in rest.splitlines()} <= {"round"}
    assert "Traceback" not in message
    assert_resumable(message, out, site)


@pytest.mark.parametrize("argv", [["--version"], ["config"]])
def test_a_reader_that_goes_away_is_no_traceback(argv: list[str], here: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [FEDLORA, *argv],
        cwd=here,
        env=environment(),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def in_a_terminal(argv: list[str], cwd: Path, when: Callable[[str], bool]) -> tuple[int, str]:
    """Run in a pseudo-terminal of 80 columns; press Ctrl-C when the output so far says so."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def as_in_a_shell() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, where the tests run in background

    process = subprocess.Popen(
        argv,
        cwd=cwd,
        env=environment(),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        preexec_fn=as_in_a_shell,
    )
    os.close(follower)
    text, pressed = "", False
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        text += data.decode(errors="replace")
        if not pressed and when(text):
            os.write(leader, b"\x03")
            pressed = True
    os.close(leader)
    return process.wait(), text


def test_a_terminal_shows_bars_and_ctrl_c_gives_the_cursor_back(site: Path) -> None:
    def second_round(text: str) -> bool:
        return any(line.startswith(" " * 4 + "2 ") for line in screen(text))

    code, text = in_a_terminal(long_run(site, "out"), site, second_round)
    assert code == 130
    for part in ("rounds ", "clients ", "steps ", "━", f"/{LONG}"):
        assert part in text
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert hide in text
    assert show in text.rpartition(hide)[2]
    lines = [line for line in screen(text) if line.strip()]
    assert max(map(len, lines)) <= 80
    head = next(n for n, line in enumerate(lines) if line.startswith("round "))
    introduction = " ".join(" ".join(lines[:head]).split())
    assert "2 target modules, method exact, 10 rounds -> out 4 clients, ranks 8 4" in introduction
    rows = [line.split()[0] for line in lines[head + 1 :] if re.match(r" +\d", line)]
    assert rows[:3] == ["0", "1", "2"]
    assert "Traceback" not in text
    assert_resumable(lines[-1], "out", site)


def screen(text: str) -> list[str]:
    """The lines that stay, without colours and what was erased."""
    lines = [line.rpartition("\x1b[2K")[2] for line in text.replace("\r\n", "\n").split("\n")]
    return [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r|\^C", "", line) for line in lines]
