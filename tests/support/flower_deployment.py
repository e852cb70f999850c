"""Deploys Flower on loopback: a SuperLink with TLS and authentication, its SuperExec, SuperNodes.

Processes of Flower alone; the sites' workers, whose sockets the SuperNodes are told, are the
caller's. A process that ends is started again, as the scripts of `fedlora deploy flower` do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOOLS = Path(sys.executable).parent
"""Where Flower's commands lie."""

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.3",
    "OMP_NUM_THREADS": "1",
}
"""The environment of all Flower processes, beside FLWR_HOME."""

OFTEN = """\
import flwr.supercore.heartbeat as sender, flwr.supernode.fleet_http_connection as told
sender.HEARTBEAT_DEFAULT_INTERVAL = told.HEARTBEAT_DEFAULT_INTERVAL = 10
from flwr.supernode.cli import flower_supernode
flower_supernode()
"""
"""A SuperNode that shows that it lives so often that it is missed after 20 s, not after 60."""

CONNECTION = "tls"
"""The name of the connection to the SuperLink in Flower's `config.toml`."""


def flower_environment(home: Path) -> dict[str, str]:
    """The environment in which Flower's processes find each other's commands, and phone nobody."""
    path = f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **QUIET, "FLWR_HOME": str(home), "PATH": path}


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def wait_for(ready: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
    """What `ready` gives once it is true."""
    until = time.monotonic() + seconds
    while True:
        if value := ready():
            return value
        assert time.monotonic() < until, f"{what} did not come within {seconds:g} s"
        time.sleep(0.1)


def write_certificates(directory: Path) -> None:
    """An authority (`ca.crt`), and a certificate of 127.0.0.1 (`server.pem`, `server.key`)."""
    (directory / "server.ext").write_text(
        "subjectAltName=DNS:localhost,IP:127.0.0.1\nextendedKeyUsage=serverAuth\n"
        "basicConstraints=CA:FALSE\n"
    )
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for command in (
        ["req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=ca"],
        ["req", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost"],
        [
            *("x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key"),
            *("-CAcreateserial", "-out", "server.pem", "-days", "2", "-extfile", "server.ext"),
        ],
    ):
        subprocess.run(["openssl", *command], cwd=directory, check=True, capture_output=True)


def _end_with_parent() -> None:
    """End with the tests, however these end (Linux)."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass
class Deployment:
    """A SuperLink and SuperNodes on loopback.

    Args:
        directory: of keys, certificates, logs and Flower's home.
        sockets: site -> the socket of its worker; each gets a SuperNode.
    """

    directory: Path
    sockets: Mapping[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.port = free_port()
        self.node_ports = {name: free_port() for name in self.sockets}
        self.environment = flower_environment(self.directory)
        self._kept = dict[str, tuple[str, ...]]()
        self._lock = threading.RLock()
        self._ends = threading.Event()
        # Children end with the thread that has started them: it is the same for all.
        self._starter = ThreadPoolExecutor(1)
        self._keeper = threading.Thread(target=self._keep_alive, daemon=True)
        self._keeper.start()

    # --- processes ---

    def start(self, name: str, *command: str, kept: bool = True) -> None:
        """Start a process, in a group of its own; what it says is in NAME.log.

        Args:
            name: of the process.
            command: a program beside this Python, and its arguments.
            kept: it is started again whenever it ends.
        """
        with self._lock:
            if kept:
                self._kept[name] = command
            self.processes[name] = self._starter.submit(self._spawn, name, command).result()

    def _spawn(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        with open(self.directory / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                [str(TOOLS / command[0]), *command[1:]],
                cwd=self.directory,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def _keep_alive(self) -> None:
        """Start again what has ended, until the deployment ends."""
        while not self._ends.wait(0.5):
            with self._lock:
                for name, command in self._kept.items():
                    if self.processes[name].poll() is not None:
                        self.start(name, *command)

    def kill(self, name: str) -> None:
        """Kill a process with all that it has started."""
        process = self.processes[name]
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """End all processes for good."""
        self._ends.set()
        self._keeper.join()
        for name in self.processes:
            self.kill(name)
        self._starter.shutdown()

    def log(self, name: str) -> str:
        """What a process has said."""
        return (self.directory / f"{name}.log").read_text(errors="replace")

    def start_superlink(self) -> None:
        """Start the SuperLink, and wait until it listens."""
        self.start(
            "superlink",
            *("flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", "ca.crt", "--ssl-certfile", "server.pem"),
            *("--ssl-keyfile", "server.key", "--enable-supernode-auth"),
            *("--database", "state.db", "--isolation", "process"),
        )
        wait_for(self._listens, "the SuperLink")

    def _listens(self) -> bool:
        context = ssl.create_default_context(cafile=str(self.directory / "ca.crt"))
        try:
            url = f"https://127.0.0.1:{self.port}/health"
            with urllib.request.urlopen(url, context=context, timeout=5):
                return True
        except (OSError, urllib.error.URLError):
            return False

    def start_superexec(self) -> None:
        """Start what runs ServerApps; it outlives the SuperLink."""
        address = f"127.0.0.1:{self.port}"
        self.start(
            "superexec",
            *("flower-superexec", "--runtime-api-address", address),
            *("--root-certificates", "ca.crt"),
        )

    def start_supernode(self, name: str, kept: bool = True) -> None:
        """Start the SuperNode of a site."""
        self.start(
            name,
            *(Path(sys.executable).name, "-c", OFTEN, "--superlink", f"127.0.0.1:{self.port}"),
            *("--root-certificates", "ca.crt", "--auth-supernode-private-key", f"{name}.key"),
            *("--host", "127.0.0.1", "--port", str(self.node_ports.setdefault(name, free_port()))),
            *("--node-config", f'socket="{self.sockets.get(name, "")}"'),
            kept=kept,
        )

    def server_app(self) -> int | None:
        """The process of the ServerApp that runs; None: there is none."""
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                text = status.read_bytes().decode(errors="replace")
                if "flwr-serverapp" in text and f"127.0.0.1:{self.port}" in text:
                    return int(status.parent.name)
        return None

    # --- keys and commands ---

    def flwr(self, *arguments: str) -> str:
        """What Flower's command line tool prints."""
        done = subprocess.run(
            [str(TOOLS / "flwr"), *arguments],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def make_key(self, name: str) -> None:
        """A key pair, NAME.key and NAME.key.pub."""
        key = str(self.directory / f"{name}.key")
        command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", key]
        subprocess.run(command, check=True, capture_output=True)

    def prepare(self) -> None:
        """Certificates, keys, and the connection in Flower's configuration."""
        write_certificates(self.directory)
        for name in self.sockets:
            self.make_key(name)
        (self.directory / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.directory / "ca.crt"}"\n'
        )

    def up(self) -> None:
        """Start everything, and wait for nothing but the SuperLink."""
        self.prepare()
        self.start_superlink()
        self.start_superexec()
        for name in self.sockets:
            self.flwr("supernode", "register", f"{name}.key.pub", CONNECTION)
            self.start_supernode(name)


@contextmanager
def deployed(directory: Path, sockets: Mapping[str, str]) -> Iterator[Deployment]:
    """A deployment whose processes all end with it."""
    with closing(Deployment(directory, sockets)) as deployment:
        deployment.up()
        yield deployment


@contextmanager
def simulating(directory: Path) -> Iterator[tuple[dict[str, str], subprocess.Popen[bytes]]]:
    """A SuperLink that simulates nodes, its connection being Flower's default.

    Args:
        directory: becomes Flower's home.

    Yields:
        The environment of Flower's commands, and the SuperLink's process.
    """
    port, environment = free_port(), flower_environment(directory)
    (directory / "config.toml").write_text(
        f'[superlink]\ndefault = "simulation"\n\n[superlink.simulation]\n'
        f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    with open(directory / "superlink.log", "ab") as log:
        link = subprocess.Popen(
            [TOOLS / "flower-superlink", "--insecure", "--simulation", "--port", str(port)],
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        wait_for(lambda: _is_open(port), "the SuperLink")
        yield environment, link
    finally:
        with suppress(ProcessLookupError):
            os.killpg(link.pid, signal.SIGKILL)
        link.wait()


def _is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
