"""NVIDIA FLARE as the engine: start-up, messages to sites, and its own transfer of arrays.

    .venv/bin/python benchmarks/engines.py nvflare

`measures(quick, sites)` deploys a federation with `fedlora deploy nvflare` on loopback; workers
that send back what they get stand for those of the sites. "To the workers" is what a run does: a
message is one buffer, and goes on over the worker's socket. "FLARE alone" sends arrays of numpy to
the sites' job processes and back.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import engines_nvflare_job as job
import yaml
from engines_echo import echoes

from fedlora.commands.deploy.nvflare.folders import deploy
from fedlora.config.federation_file import read_federation
from fedlora.engines.nvflare.kit import EXECUTOR, OWN_FILE, TASK, read_admin_kit
from fedlora.engines.nvflare.order import POLL
from fedlora.engines.nvflare.session import UnreachableError, connect, has_ended

HERE = Path(__file__).resolve().parent
ADMIN = "ada@example.org"
MANY = 448  # tensors of an adapter with A and B in 224 modules
SMALL = [[0, 20, 0], [50, 2, 0], [50, 2, 1], [50, 2, MANY]]
"""Megabytes each way, rounds, and number of arrays; 0: to the workers."""
LARGE = [[200, 2, 0], [200, 2, 1], [200, 2, MANY]]


def measures(quick: bool, sites: int = 3) -> Iterator[tuple[str, str]]:
    """Cases and figures."""
    cases = SMALL if quick else SMALL + LARGE
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nv")))
        names = [f"site-{k}" for k in range(sites)]
        folders = _deployed(directory, names)
        stack.enter_context(echoes(directory, sites))
        began = time.perf_counter()
        for name in ("server", *names):
            stack.callback(_end, _started(folders / name))
        session = stack.enter_context(_Session(folders / ADMIN / "kit", names))
        yield f"server and {sites} sites up, s", f"{time.perf_counter() - began:.1f}"
        output = directory / "measured.json"
        submitted = time.time()
        number = session.submit(_job(directory / "job", names, cases, output))
        while not has_ended(session.status(number)):
            time.sleep(0.5)
        told = json.loads(output.read_text())
        yield "from submitting a job to its first message, s", f"{told['began'] - submitted:.1f}"
        for (megabytes, _, arrays), seconds in zip(cases, told["seconds"], strict=True):
            what = "trivial round"
            if megabytes:
                how = f"FLARE alone, arrays: {arrays}" if arrays else "to the workers"
                what = f"round of {megabytes} MB down and up, {how}"
            yield f"{what}, {sites} sites, s", f"{seconds:.2f}"
        yield f"server's job process with {sites} sites, peak MiB", f"{told['peak_mib']:.0f}"


class _Session:
    """An admin, once all sites are there."""

    def __init__(self, kit: Path, names: list[str]) -> None:
        self.kit, self.names = read_admin_kit(kit), names

    def __enter__(self) -> Any:
        while True:
            try:
                self.session = connect(self.kit)
                if list(self.session.sites()) == sorted(self.names):
                    return self.session
                self.session.close()
            except UnreachableError:
                pass
            time.sleep(1)

    def __exit__(self, *error: object) -> None:
        self.session.close()


def _deployed(directory: Path, names: list[str]) -> Path:
    """The folders of a federation whose allow-lists name what the benchmark builds."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    port, admin_port = (x.getsockname()[1] for x in sockets)
    for x in sockets:
        x.close()
    federation = {
        "name": "benchmark",
        "server": {"host": "localhost", "port": port, "admin_port": admin_port},
        "sites": dict.fromkeys(names),
        "admins": {ADMIN: "lead"},
    }
    (directory / "federation.yaml").write_text(yaml.safe_dump(federation))
    folders = directory / "folders"
    deploy(read_federation(directory / "federation.yaml"), folders)
    _allow(folders / "server" / "kit" / "local" / "resources.json.in", "Rounds")
    for name in names:
        _allow(folders / name / "kit" / "local" / "resources.json", "Echo")
        own = {"socket": str(directory / f"{name}.sock")}
        (folders / name / "kit" / OWN_FILE).write_text(json.dumps(own))
    return folders


def _allow(path: Path, name: str) -> None:
    resources = json.loads(path.read_text())
    resources["class_allow_list"].append(f"{job.__name__}.{name}")
    path.write_text(json.dumps(resources))


def _started(folder: Path) -> subprocess.Popen[bytes]:
    """A participant; a site without a worker of its own."""
    command = ["bash", "start"]
    if folder.name != "server":
        command = ["bash", "kit/startup/sub_start.sh", "--once"]
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    more = {"FEDLORA_PYTHON": sys.executable, "PYTHONPATH": path, "PATH": binaries}
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **more},
        stdout=(folder / "benchmark.log").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()


def _job(path: Path, names: list[str], cases: list[list[Any]], output: Path) -> Path:
    """The job of the benchmark."""
    args = {"cases": cases, "output": str(output)}
    executors = [
        {"tasks": [TASK], "executor": {"path": EXECUTOR, "args": {}}},
        {"tasks": [job.ARRAYS], "executor": {"path": f"{job.__name__}.Echo", "args": {}}},
    ]
    workflow = {"id": "rounds", "path": f"{job.__name__}.Rounds", "args": args}
    common = {"format_version": 2, "task_data_filters": [], "task_result_filters": []}
    files = {
        "meta.json": {
            "name": path.name,
            "min_clients": len(names),
            "deploy_map": {"server": ["server"], "site": names},
            "resource_spec": {},
        },
        "server/config/config_fed_server.json": {
            **common,
            "server": {"task_request_interval": POLL},
            "workflows": [workflow],
        },
        "site/config/config_fed_client.json": {**common, "executors": executors},
    }
    for name, values in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(json.dumps(values))
    return path
