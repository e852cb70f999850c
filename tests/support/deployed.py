"""A federation of NVIDIA FLARE on loopback, as `fedlora deploy nvflare` lays it out.

Server, clients and workers are started by their folders' own `start`, each in a process group.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fedlora.commands.cli import main
from fedlora.embedded import instructions
from fedlora.engines.nvflare.kit import read_admin_kit
from fedlora.engines.nvflare.session import UnreachableError, connect
from fedlora.errors import FedloraError
from support.namespaces import Network
from support.paths import REPOSITORY
from support.rows import write_jsonl

SITES = ("alpha", "beta", "gamma")
LEAD, MEMBER = "ada@example.org", "bob@example.org"
SOURCE = REPOSITORY / "src"
PATIENCE = 300.0  # seconds for a condition, on a machine that does other things too


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [x.getsockname()[1] for x in sockets]
    for x in sockets:
        x.close()
    return ports


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait until something holds."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(1.0)


@dataclass
class Deployed:
    """The folders of a federation, and who runs.

    Args:
        folders: of the participants; what belongs to no participant lies beside them.
        network: the machines that the participants are; None: all are this one.
    """

    folders: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    network: Network | None = None

    def kit(self, admin: str = LEAD) -> Path:
        return self.folders / admin / "kit"

    def deploy(self, bounds: dict[str, Any]) -> None:
        """Lay out the folders, and give every site its rows."""
        port, admin_port = free_ports(2)
        host = self.network.address("server") if self.network else "localhost"
        own = {"model_name_or_path": "embedded", "use_cpu": True, "client_eval_fraction": 0.25}
        federation = {
            "name": "clinics",
            "server": {"host": host, "port": port, "admin_port": admin_port},
            "sites": {
                name: {"bounds": bounds, "train_file": "rows.jsonl", **own} for name in SITES
            },
            "admins": {LEAD: "lead", MEMBER: "member"},
        }
        file = self.folders.parent / "clinics.yaml"
        file.write_text(yaml.safe_dump(federation, sort_keys=False))
        assert main(["deploy", "nvflare", str(file), "--output", str(self.folders)]) == 0
        for seed, name in enumerate(SITES):
            rows = instructions(96, seed=seed, split="train")
            write_jsonl(self.folders / name / "rows.jsonl", rows)

    def start(self, names: Sequence[str] = ("server", *SITES), source: Path = SOURCE) -> None:
        """Start participants, and wait until the sites are connected.

        Args:
            names: of the participants.
            source: of the package that they run.
        """
        registered = {name: self._registered(name) for name in names if name != "server"}
        for name in names:
            self.running[name] = subprocess.Popen(
                [*(self.network.within(name) if self.network else ()), "bash", "start"],
                cwd=self.folders / name,
                env={
                    **os.environ,
                    "FEDLORA_PYTHON": sys.executable,
                    "PYTHONPATH": str(source),
                    "OMP_NUM_THREADS": "1",
                },
                stdout=(self.folders / name / "start.log").open("ab"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        for name, before in registered.items():
            until(lambda n=name, x=before: self._registered(n) > x, f"{name} is connected")  # type: ignore[misc]
        if "server" in names:
            until(lambda: self.connected() == list(SITES), f"connected: {self.connected()}")

    def _registered(self, name: str) -> int:
        """How often a site has registered with the server."""
        log = self.folders / name / "client.log"
        return log.read_text().count("Successfully registered") if log.exists() else 0

    def connected(self) -> list[str]:
        """The sites that the server hears."""
        try:
            session = connect(read_admin_kit(self.kit()))
        except UnreachableError:
            return []
        try:
            return list(session.sites())
        except FedloraError:
            return []
        finally:
            session.close()

    def kill(self, name: str) -> None:
        """Kill a participant with all of its processes, without a word."""
        kill_all(self.folders / name)
        if process := self.running.pop(name, None):
            process.wait()

    def stop(self) -> None:
        """Kill all that runs."""
        kill_all(self.folders)
        for process in self.running.values():
            process.wait()

    def job_process(self, name: str) -> int:
        """The process in which a participant runs its part of a job."""
        for process, words in processes_of(self.folders / name).items():
            if ".client.worker_process" in words or "runner_process" in words:
                return process
        raise LookupError(name)


def processes_of(folder: Path) -> dict[int, str]:
    """Processes that run in a folder or were told of it, and their command lines."""
    found = {}
    for path in Path("/proc").iterdir():
        try:
            words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            at = Path(os.readlink(path / "cwd"))
        except OSError:
            continue
        ours = f"{folder}/" in words or at.is_relative_to(folder)
        if ours and int(path.name) != os.getpid():
            found[int(path.name)] = words
    return found


def kill_all(folder: Path) -> None:
    """Kill what runs in a folder, also what is started while this goes on."""
    while processes := processes_of(folder):
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


def in_one_process(keys: dict[str, Any], folders: Path, out: Path) -> Path:
    """The same run without processes; gives its directory."""
    import fedlora

    out.parent.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(SITES):
        shutil.copy(folders / name / "rows.jsonl", out.parent / f"{number}.jsonl")
    left_out = ("engine", "kit", "server_evaluation")
    plain = {key: x for key, x in keys.items() if key not in left_out}
    own = {"train_file": str(out.parent / "[0-2].jsonl"), "client_eval_fraction": 0.25}
    beside = {"cohort_size": 1, "use_cpu": True, "output_dir": str(out)}
    return fedlora.run(fedlora.Config(**{**plain, **own, **beside})).output_dir
