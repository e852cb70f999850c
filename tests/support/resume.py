"""Kills runs at a point of their course, and reads what they have left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedlora
import fedlora.methods
from fedlora.runs.metrics_log import read_metrics
from support.paths import REPOSITORY
from support.runs import timeless

ROUNDS = 3


# One process that has loaded everything, the base among it; every request runs in a fork of it,
# which may be killed.
DRIVER = '''
import json, os, resource, shutil, signal, sys
from pathlib import Path

import torch

torch.set_num_threads(1)
import peft, transformers
from fedlora.adapters import saved_adapter as adapters
from fedlora.client import worker
from fedlora.commands import cli
from fedlora.config.config import Config
from fedlora.config.yaml_file import read_yaml
from fedlora.engines import local
from fedlora.model import passes
from fedlora.runs import directory as checkpoint
from fedlora.runs import safe_writing, saved_state
from fedlora.runs import session
from support.kept_bases import load_or_reuse


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner, name, n, matches, act):
    """Run `act` and die at the n-th call of `owner.name` whose arguments match."""
    original, seen = getattr(owner, name), 0

    def wrapped(*args, **kwargs):
        nonlocal seen
        if matches(*args):
            seen += 1
            if seen == n:
                act(original, *args, **kwargs)
                die()
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


def half_a_file(original, path, tensors):
    original(path, tensors)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def half_a_line(original, directory, line):
    with (directory.path / "metrics.jsonl").open("a") as out:
        text = json.dumps(line)
        out.write(text[: len(text) // 2])


def half_removed(original, path, **_):
    sorted(p for p in Path(path).rglob("*") if p.is_file())[0].unlink()


def any_call(*args):
    return True


def named(ending):
    return lambda path, *_: str(path).endswith(ending)


def round_line(directory, line):
    return line["event"] == "round"


POINTS = {
    "before training": (worker.Worker, "handle_together", any_call, die),
    "in a client's steps": (passes.PackedRunner, "backward", any_call, die),
    "before the directory": (Path, "rename", named(".out.partial"), die),
    "before the first line": (checkpoint.RunDirectory, "append", any_call, die),
    "half of the state": (saved_state, "save_tensors", named("server.safetensors"), half_a_file),
    "half of a change": (saved_state, "save_tensors", named("change-2.safetensors"), half_a_file),
    "a change and no more": (saved_state, "save_tensors", named("server.safetensors"), die),
    "before a link": (os, "link", any_call, die),
    "before the manifest": (safe_writing, "_write_manifest", any_call, die),
    "half of the adapter": (adapters, "save_tensors", any_call, half_a_file),
    "manifest, no name yet": (Path, "rename", named(".partial"), die),
    "no metrics line yet": (checkpoint.RunDirectory, "append", round_line, die),
    "half a metrics line": (checkpoint.RunDirectory, "append", round_line, half_a_line),
    "before pruning": (Path, "rename", named("round-1"), die),
    "while pruning": (shutil, "rmtree", lambda p, *_: p.name == ".round-1.removed" and p.exists(),
                      half_removed),
    "half of final": (adapters, "save_tensors", lambda p, *_: p.parent.name == ".final.partial",
                      half_a_file),
    "before final is named": (Path, "rename", named(".final.partial"), die),
}


def count(limit):
    """Die at a call of the package's own code: the limit-th, or count them all."""
    seen = 0

    def profile(frame, event, argument):
        nonlocal seen
        if event in ("call", "c_call") and "/fedlora/" in frame.f_code.co_filename:
            seen += 1
            if seen == limit:
                die()

    sys.setprofile(profile)
    return lambda: seen


def child(request):
    for name, mode in (("out", 1), ("err", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), mode)
    if "file_size" in request:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
    if "point" in request:
        owner, name, matches, act = POINTS[request["point"]]
        at(owner, name, request.get("n", 1), matches, act)
    calls = count(request["calls"]) if "calls" in request else None
    code = cli.main(request["argv"])
    sys.setprofile(None)
    if calls:
        print("calls", calls())
    sys.stdout.flush()
    return code


session.load_base = load_or_reuse
session.assemble(Config(**read_yaml(sys.argv[1])))
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = 99
        try:
            code = child(json.loads(line))
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
'''


@dataclass
class Driver:
    """Runs the command line in a process that a request may have killed."""

    process: subprocess.Popen[str]
    path: Path

    def __call__(self, *argv: object, **request: Any) -> int:
        assert self.process.stdin
        assert self.process.stdout
        request |= {"argv": [str(a) for a in argv]}
        request |= {"out": str(self.path / "stdout"), "err": str(self.path / "stderr")}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def kill(self, *argv: object, **request: Any) -> None:
        code = self(*argv, **request)
        assert code == -signal.SIGKILL, f"{code}: {self.stderr}"

    @property
    def stdout(self) -> str:
        return (self.path / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.path / "stderr").read_text()


@pytest.fixture(scope="module")
def driver(
    tiny_llama: Path, site_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Driver]:
    path = tmp_path_factory.mktemp("driver")
    (path / "driver.py").write_text(DRIVER)
    keys = {"model_name_or_path": str(tiny_llama), "train_file": str(site_files / "site_*.jsonl")}
    config = write(path / "config.yaml", {**keys, "num_threads": 1, "output_dir": str(path)})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    here = str(REPOSITORY / "tests")
    environment["PYTHONPATH"] = os.pathsep.join([here, environment.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, str(path / "driver.py"), str(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield Driver(process, path)
        assert process.stdin
        process.stdin.close()


def write(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def course(path: Path) -> list[dict[str, Any]]:
    """What `metrics.jsonl` tells of a run, without what depends on the clock."""
    return [timeless(line) for line in read_metrics(path)]


def whole_lines(path: Path) -> bytes:
    file = path / "metrics.jsonl"
    content = file.read_bytes() if file.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def begin(driver: Driver, tmp_path: Path, keys: dict[str, Any], **request: Any) -> Path:
    """Start a run in `tmp_path/out` and have it killed."""
    config = write(tmp_path / "config.yaml", {**keys, "output_dir": str(tmp_path / "out")})
    driver.kill("run", config, **request)
    return tmp_path / "out"


class StoppedError(Exception):
    """Raised by a callback to end a run."""


def stop_after(number: int) -> Callable[[fedlora.RoundResult], None]:
    def stop(result: fedlora.RoundResult) -> None:
        if result.record.round == number:
            raise StoppedError

    return stop
