"""Starts workers as a shell does, and records what they send."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.engines import carrier
from support.script import FEDLORA, environment

PATIENCE = 120.0
"""Seconds for what takes a moment on a machine that is busy."""


def until(done: Callable[[], Any]) -> Any:
    """What the function gives, once that is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if found := done():
            return found
        time.sleep(0.05)
    raise AssertionError("it has not come true")


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


@dataclass
class WorkerProcess:
    """A worker that runs.

    Args:
        process: its supervisor.
        address: of its socket.
        log: what it prints.
    """

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    def status(self) -> dict[str, Any]:
        """What it is at."""
        return carrier.status(self.address)

    def status_soon(self) -> dict[str, Any] | None:
        """What it is at; None: it is not called yet."""
        with contextlib.suppress(carrier.SiteError):
            return self.status()
        return None

    def kill_child(self) -> int:
        """Kill the process that holds torch; gives its number."""
        pid = int(self.status()["pid"])
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid))
        return pid

    def call(self, message: bytes) -> bytes:
        """Its answer to a message; one that dies under it is asked again."""
        for _ in range(3):
            try:
                return carrier.call(self.address, message, seconds=PATIENCE)
            except carrier.SiteError as error:
                if error.kind != "died":
                    raise
        raise AssertionError("it dies again and again")


@contextlib.contextmanager
def worker(site_file: Path, address: str) -> Iterator[WorkerProcess]:
    """A worker that runs, killed at the end where it runs then."""
    log = site_file.with_suffix(".log")
    with log.open("ab") as out:
        process = subprocess.Popen(
            [FEDLORA, "worker", "--site", str(site_file)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment(),
        )
    running = WorkerProcess(process, address, log)
    try:
        until(lambda: process.poll() is not None or running.status_soon())
        assert process.poll() is None, log.read_text()
        yield running
    finally:
        process.kill()
        process.wait()


def ask_cli(site_file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`fedlora worker --site FILE` with options."""
    command = [FEDLORA, "worker", "--site", str(site_file), *options]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def told(site_file: Path, *options: str) -> dict[str, Any]:
    """The object that such a command writes."""
    done = ask_cli(site_file, *options, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass
class Recorder:
    """A socket before a worker's, which keeps every byte that the worker sends.

    Args:
        address: of this socket.
        behind: of the worker's.
        sent: by the worker.
    """

    address: str
    behind: str
    sent: bytearray = field(default_factory=bytearray)

    @contextlib.contextmanager
    def open(self) -> Iterator[Recorder]:
        """Pass calls on as long as this lasts."""
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(self.address)
            server.listen()
            threading.Thread(target=self._accept, args=(server,), daemon=True).start()
            yield self

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                caller, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=self._pass, args=(caller,), daemon=True).start()

    def _pass(self, caller: socket.socket) -> None:
        with caller, socket.socket(socket.AF_UNIX) as real:
            real.connect(self.behind)
            forth = threading.Thread(target=self._forth, args=(caller, real), daemon=True)
            forth.start()
            while part := real.recv(2**16):
                self.sent += part
                caller.sendall(part)

    def _forth(self, caller: socket.socket, real: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := caller.recv(2**16):
                real.sendall(part)
