"""Keeps the worker of a site alive: owns its socket, and starts its process again when it crashes.

This process imports no torch. It listens on the socket and hands it down to a child, which takes
the calls, so the socket stays when the child goes: who calls meanwhile waits until the next one is
up. A child that ends by itself with 0 was told to stop; one that cannot begin is not started again.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fedlora.config.site import Site
from fedlora.engines import carrier
from fedlora.engines.frames import FrameError, read_door
from fedlora.engines.site_child import CANNOT_BEGIN
from fedlora.errors import FedloraError, InputError

MOST_CRASHES = 5
"""Crashes within `CRASH_WINDOW` after which the worker gives up."""
CRASH_WINDOW = 600.0
"""Seconds."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before a child is started again
_PATIENCE = 10.0  # seconds for a child to end
_BACKLOG = 64

Tell = Callable[[str], None]


class _StopError(Exception):
    """The supervisor was told to end."""


@dataclass
class _Crashes:
    """When children have crashed, lately.

    Args:
        times: on the clock of `time.monotonic`.
    """

    times: list[float] = field(default_factory=list)

    def pause(self) -> float | None:
        """Note a crash. How long to wait before the next start; None: give up."""
        now = time.monotonic()
        self.times = [t for t in self.times if now - t < CRASH_WINDOW] + [now]
        if len(self.times) >= MOST_CRASHES:
            return None
        return min(_FIRST_PAUSE * 2.0 ** (len(self.times) - 1), _LONGEST_PAUSE)


def supervise(path: Path, site: Site, tell: Tell) -> None:
    """Serve a site until its worker is told to stop: by a call, SIGTERM or Ctrl-C.

    Args:
        path: of the site's file.
        site: what stands in it.
        tell: is told what a person should know.

    Raises:
        InputError: the socket or port is in use, the worker's directory is, or what the file says
            cannot be used.
        FedloraError: the worker crashes again and again.
    """
    with _locked(Path(site.state_dir)), _listening(site) as server:
        where = f"127.0.0.1:{site.port} (called by {site.socket})" if site.port else site.socket
        tell(f"{site.name} listens on {where}")
        heard = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
        previous = {number: signal.signal(number, _stop) for number in heard}
        try:
            _keep_alive(path, server, tell)
        except _StopError:
            tell("stopped")
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def _stop(number: int, frame: FrameType | None) -> None:
    for other in _SIGNALS:  # a second one does not disturb the end
        signal.signal(other, signal.SIG_IGN)
    raise _StopError


def _keep_alive(path: Path, server: socket.socket, tell: Tell) -> None:
    """Run children one after the other, until one ends as it was told to."""
    crashes, restarts = _Crashes(), 0
    while True:
        code, said = _run_child(path, server, restarts)
        if code == 0:
            tell("stopped")
            return
        if code == CANNOT_BEGIN and said:
            raise InputError(said)
        pause = crashes.pause()
        if pause is None:
            raise FedloraError(
                f"the worker crashed {MOST_CRASHES} times within {CRASH_WINDOW / 60:.0f} minutes, "
                f"the last time {_ended(code)}; what it printed above says more"
            )
        tell(f"the worker {_ended(code)}; it is started again in {pause:g} s")
        time.sleep(pause)
        restarts += 1


def _run_child(path: Path, server: socket.socket, restarts: int) -> tuple[int, str]:
    """Start a child and wait for its end: its exit code, and why it could not begin."""
    ours, theirs = socket.socketpair()
    with closing(ours):
        with closing(theirs):
            numbers = server.fileno(), theirs.fileno()
            child = subprocess.Popen(
                [sys.executable, "-m", "fedlora.engines.site_child"]
                + [str(x) for x in (path.resolve(), *numbers, restarts)],
                stdin=subprocess.DEVNULL,
                pass_fds=numbers,
                env=_environment(),
                process_group=0,  # Ctrl-C reaches this process alone, which ends the child
            )
        try:
            code = child.wait()
        except BaseException:
            _end(child)
            raise
        return code, _last_words(ours)


def _environment() -> dict[str, str]:
    """The child's environment: libraries show no progress bars in a log."""
    quiet = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    return {**quiet, **os.environ}


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _last_words(lifeline: socket.socket) -> str:
    """What a child that has ended wrote before."""
    said = b""
    with suppress(ConnectionResetError):
        while part := lifeline.recv(4096):
            said += part
    return said.decode(errors="replace")


def _ended(code: int) -> str:
    if code < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}"


# --- socket ---


@contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Nobody else keeps what a worker needs in this directory.

    Raises:
        InputError: a living worker does, or it cannot be written to.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = open(state_dir / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise InputError(
            f"state_dir: {state_dir}: cannot be written to: {error.strerror}"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"state_dir: {state_dir}: is in use by a worker that runs; end it with fedlora "
                "worker --stop, or give this one a directory of its own"
            ) from None
        yield


@contextmanager
def _listening(site: Site) -> Iterator[socket.socket]:
    """The site's socket, removed at the end.

    Raises:
        InputError: somebody else listens there, or it cannot be made.
    """
    path = Path(site.socket)
    _remove_stale(path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        server = _bound(path) if site.port is None else _bound_to_port(path, site.port)
    except OSError as error:
        raise InputError(f"socket: {path}: cannot be made: {error.strerror or error}") from None
    try:
        with server:
            yield server
    finally:
        path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove what a worker left behind that was killed.

    Raises:
        InputError: a living worker listens there, or it is another file.
    """
    if not path.exists():
        return
    try:
        door = read_door(str(path))
    except (FrameError, OSError):
        door = None
    if door is None and not path.is_socket():
        raise InputError(f"socket: {path}: is another file; give the socket a path of its own")
    kind = _what_answers(str(path))
    # Behind a port of old there may be another program by now.
    if kind == "worker" or (door is None and kind != "absent"):
        raise _in_use(path)
    path.unlink()


def _what_answers(address: str) -> str:
    """The word worker, or the kind of error a call meets; one that is dying is waited for."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            carrier.status(address)
        except carrier.SiteError as error:
            if error.kind != "died" or time.monotonic() > until:
                return error.kind
        else:
            return "worker"
        time.sleep(0.1)


def _in_use(path: Path) -> InputError:
    return InputError(
        f"socket: {path}: is in use by a worker that runs; end it with fedlora worker --stop, or "
        "give this one a socket of its own"
    )


def _bound(path: Path) -> socket.socket:
    """A Unix socket that this user alone can open."""
    server = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        server.bind(str(path))
    finally:
        os.umask(before)
    server.listen(_BACKLOG)
    return server


def _bound_to_port(path: Path, port: int) -> socket.socket:
    """A loopback port, and the file that says how to call it, which this user alone can read.

    Raises:
        InputError: the port is in use.
    """
    server = socket.socket(socket.AF_INET)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(("127.0.0.1", port))
        server.listen(_BACKLOG)
    except OSError as error:
        server.close()
        raise InputError(
            f"port: {port}: cannot be listened on ({error.strerror}); give another one"
        ) from None
    text = json.dumps({"port": port, "token": secrets.token_hex(32)})
    hidden = path.with_name(f".{path.name}.partial")
    hidden.unlink(missing_ok=True)
    with open(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    hidden.rename(path)
    return server
