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
from collections.abc import Callable, Iterable
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
        directory: for all of it.
        network: the machines that the participants are; None: all are this one.
    """

    directory: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    network: Network | None = None

    @property
    def folders(self) -> Path:
        return self.directory / "clinics"

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
        file = self.directory / "clinics.yaml"
        file.write_text(yaml.safe_dump(federation, sort_keys=False))
        assert main(["deploy", "nvflare", str(file), "--output", str(self.folders)]) == 0
        for seed, name in enumerate(SITES):
            rows = instructions(96, seed=seed, split="train")
            write_jsonl(self.folders / name / "rows.jsonl", rows)

    def start(self, names: Iterable[str] = ("server", *SITES)) -> None:
        """Start participants, and wait until all sites are connected."""
        for name in names:
            self.running[name] = subprocess.Popen(
                [*(self.network.within(name) if self.network else ()), "bash", "start"],
                cwd=self.folders / name,
                env={
                    **os.environ,
                    "FEDLORA_PYTHON": sys.executable,
                    "PYTHONPATH": str(REPOSITORY / "src"),
                    "OMP_NUM_THREADS": "1",
                },
                stdout=(self.folders / name / "start.log").open("ab"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until(lambda: self.connected() == list(SITES), f"connected: {self.connected()}")

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
        process = self.running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """End all that runs."""
        for process in self.running.values():
            os.killpg(process.pid, signal.SIGTERM)
        for name in list(self.running):
            with suppress(subprocess.TimeoutExpired):
                self.running[name].wait(20)
            with suppress(ProcessLookupError):
                self.kill(name)

    def job_process(self, name: str) -> int:
        """The process in which a participant runs its part of a job."""
        kit = f"{self.folders / name}/kit"
        for path in Path("/proc").iterdir():
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            text = b" ".join(words).decode(errors="replace")
            if kit in text and (".client.worker_process" in text or "runner_process" in text):
                return int(path.name)
        raise LookupError(name)


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
