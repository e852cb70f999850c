"""What keeps a participant from its server, and the clock; real servers are in tests/system."""

from __future__ import annotations

import socket

from fedlora.commands.doctor.checks import OK, PROBLEM, WARNING
from fedlora.commands.doctor.connection import clock_check, server_checks


def test_the_clock_is_told_and_is_no_problem() -> None:
    check = clock_check()
    assert check.state in (OK, WARNING)
    assert "UTC" in check.found


def test_a_name_that_nobody_knows() -> None:
    (check,) = server_checks("nobody.invalid", 8002, None)
    assert (check.state, "name is not known" in check.found) == (PROBLEM, True)
    assert "/etc/hosts" in check.remedy


def test_a_port_on_which_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening
        (check,) = server_checks("127.0.0.1", taken.getsockname()[1], None, "server for admins")
    assert (check.name, check.state) == ("server for admins", PROBLEM)
    assert "nobody listens there" in check.found
    assert check.remedy.startswith("start the server with ./start in its folder")
