"""A worker's socket: its own, and nobody else's; and how often it is started again."""

from __future__ import annotations

import json
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

from fedlora.config.site import Site
from fedlora.engines import site_process
from fedlora.engines.site_listener import Listener
from fedlora.engines.site_process import MOST_CRASHES, _Crashes, _ended, _listening, _locked
from fedlora.errors import InputError


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


def test_how_a_child_ended() -> None:
    assert (_ended(-9), _ended(3)) == ("was killed by SIGKILL", "ended with code 3")
