"""A worker's socket: its own, and nobody else's; and how often it is started again."""

from __future__ import annotations

import json
import signal
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.site import Site
from fedlora.engines import carrier, site_process
from fedlora.engines.site_listener import Listener
from fedlora.engines.site_process import (
    MOST_CRASHES,
    _Crashes,
    _ended,
    _listening,
    _locked,
    supervise,
)
from fedlora.errors import FedloraError, InputError


def a_site(tmp_path: Path, **values: Any) -> Site:
    return Site(name="x", **{"socket": str(tmp_path / "s"), "state_dir": str(tmp_path), **values})


class Idle:
    def status(self) -> dict[str, Any]:
        return {"state": "idle"}


def test_a_socket_for_this_user_alone_that_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "s"
    with _listening(a_site(tmp_path, socket=str(path))):
        mode = path.stat().st_mode
        assert (stat.S_ISSOCK(mode), oct(mode & 0o777)) == (True, "0o600")
    assert not path.exists()


def test_a_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "s"))
    with _listening(a_site(tmp_path)) as server:
        assert server.getsockname() == str(tmp_path / "s")


def test_a_socket_in_use_is_not(tmp_path: Path) -> None:
    with _listening(a_site(tmp_path)) as server:
        Listener(server, Idle(), None).start()  # type: ignore[arg-type]
        with (
            pytest.raises(InputError, match="is in use by a worker that runs"),
            _listening(a_site(tmp_path)),
        ):
            pass
        assert (tmp_path / "s").exists()


def test_a_worker_that_is_dying_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process holds the socket until all its threads are gone."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "s"))
    kinds = ["died", "died", "absent"]

    def status(address: str) -> None:
        raise carrier.SiteError(kinds.pop(0), "")

    monkeypatch.setattr(carrier, "status", status)
    monkeypatch.setattr(site_process.time, "sleep", lambda seconds: None)
    with _listening(a_site(tmp_path)):
        assert kinds == []


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("notes")
    with pytest.raises(InputError, match="is another file"), _listening(a_site(tmp_path)):
        pass
    assert (tmp_path / "s").read_text() == "notes"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_port_and_its_token_for_this_user_alone(tmp_path: Path) -> None:
    path, port = tmp_path / "s", free_port()
    path.write_text(json.dumps({"port": port, "token": "of a worker that was killed"}))
    with _listening(a_site(tmp_path, port=port)) as server:
        told = json.loads(path.read_text())
        assert server.getsockname() == ("127.0.0.1", port)
        assert (told["port"], len(told["token"])) == (port, 64)
        assert oct(path.stat().st_mode & 0o777) == "0o600"
    assert not path.exists()


def test_a_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(InputError, match=f"port: {port}: cannot be listened on"),
            _listening(a_site(tmp_path, port=port)),
        ):
            pass


def test_one_worker_has_a_directory(tmp_path: Path) -> None:
    with (
        _locked(tmp_path / "state"),
        pytest.raises(InputError, match="is in use by a worker that runs"),
        _locked(tmp_path / "state"),
    ):
        pass
    with _locked(tmp_path / "state"):
        pass


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"state_dir: .* cannot be written to"),
        _locked(tmp_path / "file" / "state"),
    ):
        pass


def test_pauses_grow_and_at_last_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(site_process.time, "monotonic", lambda: now[0])
    crashes = _Crashes()
    pauses = [crashes.pause() for _ in range(MOST_CRASHES)]
    assert pauses == [0.5, 1.0, 2.0, 4.0, None]
    now[0] += site_process.CRASH_WINDOW + 1
    assert crashes.pause() == 0.5, "what was long ago does not count"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """How the children of a supervisor end, one after the other; none is started."""
    ends: list[tuple[int, str]] = []
    monkeypatch.setattr(site_process, "_run_child", lambda *_: ends.pop(0))
    monkeypatch.setattr(site_process.time, "sleep", lambda seconds: None)
    return ends


def supervised(tmp_path: Path) -> list[str]:
    """What is told by a supervisor until it ends."""
    told: list[str] = []
    supervise(tmp_path / "site.yaml", a_site(tmp_path), told.append)
    return told


def test_a_child_that_crashes_is_started_again(
    tmp_path: Path, children: list[tuple[int, str]]
) -> None:
    children += [(-9, ""), (1, ""), (0, "")]
    assert supervised(tmp_path) == [
        f"x listens on {tmp_path / 's'}",
        "the worker was killed by SIGKILL; it is started again in 0.5 s",
        "the worker ended with code 1; it is started again in 1 s",
        "stopped",
    ]
    assert not (tmp_path / "s").exists()


def test_one_that_cannot_begin_is_not(tmp_path: Path, children: list[tuple[int, str]]) -> None:
    children += [(2, "train_file: cannot be read")]
    with pytest.raises(InputError, match="train_file: cannot be read"):
        supervised(tmp_path)
    assert not (tmp_path / "s").exists()


def test_one_that_crashes_again_and_again_is_given_up(
    tmp_path: Path, children: list[tuple[int, str]]
) -> None:
    children += [(-11, "")] * MOST_CRASHES
    with pytest.raises(FedloraError, match=r"crashed 5 times within 10 minutes, .* SIGSEGV"):
        supervised(tmp_path)


def test_sigterm_ends_it_and_removes_the_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told_to_end(*_: Any) -> tuple[int, str]:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it was not told")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(site_process, "_run_child", told_to_end)
    assert supervised(tmp_path)[-1] == "stopped"
    assert not (tmp_path / "s").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_how_a_child_ended() -> None:
    assert (_ended(-9), _ended(3)) == ("was killed by SIGKILL", "ended with code 3")
