"""Deploys NVIDIA FLARE on loopback for its benchmark, with sites that have no workers yet."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines_nvflare_job as job
import yaml

from fedlora.commands.deploy.nvflare.folders import deploy
from fedlora.commands.deploy.nvflare.policy import AUTHORIZATION
from fedlora.config.federation_file import read_federation
from fedlora.embedded import instructions
from fedlora.engines.nvflare.kit import OWN_FILE, read_admin_kit
from fedlora.engines.nvflare.session import AdminSession, UnreachableError, connect, has_ended

HERE = Path(__file__).resolve().parent
ADMIN = "ada@example.org"
ROWS = 96  # of a site, a quarter of which is held out
AT_ONCE = 6  # clients that start at a time: FLARE ends one that needs too long


@dataclass(frozen=True)
class Federation:
    """A federation that runs.

    Args:
        directory: for what is measured; the participants' folders lie in it.
        names: of the sites.
        session: of its admin.
        seconds: until all were connected.
    """

    directory: Path
    names: list[str]
    session: AdminSession
    seconds: float

    @property
    def kit(self) -> Path:
        """The admin's."""
        return self.directory / "folders" / ADMIN / "kit"

    def folder(self, name: str) -> Path:
        """Of a participant."""
        return self.directory / "folders" / name

    def answer_at(self, sockets: Mapping[str, str]) -> None:
        """Have the sites' clients call these sockets from now on."""
        for name in self.names:
            own = json.dumps({"socket": sockets[name]})
            (self.folder(name) / "kit" / OWN_FILE).write_text(own)

    def carry(self, path: Path) -> float:
        """Run a job to its end; gives the time at which it was submitted."""
        submitted = time.time()
        number = self.session.submit(path)
        while not has_ended(status := self.session.status(number)):
            time.sleep(0.5)
        if status != "FINISHED:COMPLETED":
            raise RuntimeError(f"{path.name} ended as {status}; see {self.directory}")
        return submitted


@contextmanager
def federated(sites: int) -> Iterator[Federation]:
    """A federation of so many sites, whose clients run; who works for them is the caller's."""
    names = [f"site-{k}" for k in range(sites)]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nv")))
        folders = _deployed(directory, names)
        began = time.perf_counter()
        stack.callback(end, process(["bash", "start"], folders / "server"))
        session = _session(folders / ADMIN / "kit")
        stack.callback(session.close)
        running = dict[str, subprocess.Popen[bytes]]()
        stack.callback(lambda: [end(client) for client in running.values()])
        for k in range(0, sites, AT_ONCE):
            _connect(session, folders, names[k : k + AT_ONCE], running)
        yield Federation(directory, names, session, time.perf_counter() - began)


@contextmanager
def working(federation: Federation) -> Iterator[None]:
    """Every site's own worker."""
    sockets = {name: str(federation.folder(name) / "worker.sock") for name in federation.names}
    with ExitStack() as stack:
        for name in federation.names:
            command = [sys.executable, "-m", "fedlora", "worker", "--site", "site.yaml"]
            stack.callback(end, process(command, federation.folder(name)))
        while not all(Path(path).is_socket() for path in sockets.values()):
            time.sleep(0.2)
        federation.answer_at(sockets)
        yield


def process(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start a command in a folder, with this package and on one thread."""
    path = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    more = {"FEDLORA_PYTHON": sys.executable, "PYTHONPATH": path, "PATH": binaries}
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **more, "OMP_NUM_THREADS": "1"},
        stdout=(folder / "benchmark.log").open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def end(running: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    running.terminate()
    with suppress(subprocess.TimeoutExpired):
        running.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(running.pid, signal.SIGKILL)


def _session(kit: Path) -> AdminSession:
    """The admin's session, once the server is there."""
    while True:
        with suppress(UnreachableError):
            return connect(read_admin_kit(kit))
        time.sleep(0.5)


def _connect(
    session: AdminSession,
    folders: Path,
    names: list[str],
    running: dict[str, subprocess.Popen[bytes]],
) -> None:
    """Start the clients of these sites until all are connected; one that is too slow ends."""
    while not set(names) <= set(session.sites()):
        for name in names:
            if name not in running or running[name].poll() is not None:
                command = ["bash", "kit/startup/sub_start.sh", "--once"]
                running[name] = process(command, folders / name)
        time.sleep(0.5)


def _deployed(directory: Path, names: list[str]) -> Path:
    """The folders; what the benchmark builds may be built, and the admin may bring code."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    port, admin_port = (x.getsockname()[1] for x in sockets)
    for x in sockets:
        x.close()
    site: dict[str, Any] = {
        "model_name_or_path": "embedded",
        "train_file": "rows.jsonl",
        "client_eval_fraction": 0.25,
        "use_cpu": True,
    }
    federation = {
        "name": "benchmark",
        "server": {"host": "localhost", "port": port, "admin_port": admin_port},
        "sites": dict.fromkeys(names, site),
        "admins": {ADMIN: "lead"},
    }
    (directory / "federation.yaml").write_text(yaml.safe_dump(federation))
    folders = directory / "folders"
    deploy(read_federation(directory / "federation.yaml"), folders)
    _allow(folders / "server" / "kit", "resources.json.in", "Rounds")
    for seed, name in enumerate(names):
        _allow(folders / name / "kit", "resources.json", "Echo")
        rows = (json.dumps(row) + "\n" for row in instructions(ROWS, seed, "train"))
        (folders / name / "rows.jsonl").write_text("".join(rows))
    return folders


def _allow(kit: Path, resources: str, name: str) -> None:
    path = kit / "local" / resources
    values = json.loads(path.read_text())
    values["class_allow_list"].append(f"{job.__name__}.{name}")
    path.write_text(json.dumps(values))
    values = json.loads((kit / AUTHORIZATION).read_text())
    values["permissions"]["lead"]["byoc"] = "any"  # as a job of FLARE's examples needs it
    (kit / AUTHORIZATION).write_text(json.dumps(values))
