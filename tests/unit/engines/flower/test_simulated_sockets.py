"""Where simulated clients are called, and that nobody else's socket is."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.engines.flower import simulated_sockets
from fedlora.engines.flower.simulated_sockets import simulated_name, socket_directory, socket_of


@pytest.fixture(autouse=True)
def _temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(simulated_sockets.tempfile, "gettempdir", lambda: str(tmp_path))


def test_a_client_is_called_in_its_run_s_directory() -> None:
    assert socket_of(7, 3) is None
    socket_directory(7).mkdir(mode=0o700)
    assert socket_of(7, 3) == socket_directory(7) / "3.sock"
    assert socket_of(8, 3) is None


def test_a_directory_that_others_can_enter_is_not_trusted() -> None:
    socket_directory(7).mkdir()
    socket_directory(7).chmod(0o777)
    assert socket_of(7, 0) is None


def test_names_are_in_the_order_of_clients() -> None:
    names = [simulated_name(client, 12) for client in range(12)]
    assert names == sorted(names)
    assert names[3] == "client-03"
