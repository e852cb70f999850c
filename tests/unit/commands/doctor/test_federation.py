"""A federation from where runs are started: its file, and the kit of an admin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.doctor.checks import OK, PROBLEM, WARNING, Check
from fedlora.commands.doctor.federation import federation_checks
from support.federations import LEAD, MEMBER, federation_of

NOWHERE = {"host": "nobody.invalid"}


def named(found: list[Check], name: str) -> Check:
    (check,) = [check for check in found if check.name == name]
    return check


def kit_of(directory: Path, user: str) -> Path:
    """As much of an admin's kit as says whose it is."""
    (directory / "kit" / "startup").mkdir(parents=True)
    admin = {"username": user, "host": "nobody.invalid", "port": 8003}
    (directory / "kit" / "startup" / "fed_admin.json").write_text(json.dumps({"admin": admin}))
    return directory / "kit"


def test_without_a_kit_both_ports_are_tried(tmp_path: Path) -> None:
    federation = federation_of(tmp_path, server=NOWHERE, sites={"alpha": {}})
    found = list(federation_checks(federation, None))
    assert "sites alpha; admins ada@example.org (lead)" in named(found, "federation").found
    assert named(found, "bounds").state == WARNING
    assert named(found, "server").state == named(found, "server for admins").state == PROBLEM


@pytest.mark.parametrize(
    ("user", "state", "said"),
    [
        (LEAD, OK, "lead"),
        (MEMBER, WARNING, "is a member, and may look alone"),
        ("eve@example.org", PROBLEM, "is no admin of clinics"),
    ],
)
def test_who_may_start_runs(tmp_path: Path, user: str, state: str, said: str) -> None:
    admins: dict[str, Any] = {LEAD: "lead", MEMBER: "member"}
    federation = federation_of(tmp_path, server=NOWHERE, admins=admins)
    found = list(federation_checks(federation, kit_of(tmp_path, user)))
    assert named(found, "kit").state == state
    assert said in named(found, "kit").found


def test_a_kit_that_is_none(tmp_path: Path) -> None:
    found = list(federation_checks(federation_of(tmp_path, server=NOWHERE), tmp_path))
    assert "is no kit of NVIDIA FLARE" in named(found, "kit").found
