"""Kits say whose they are, and where things lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.engines.nvflare.kit import (
    OWN_FILE,
    AdminKit,
    base_at_server,
    read_admin_kit,
    runs_of,
    socket_of,
)
from fedlora.errors import InputError

ADMIN = {"admin": {"username": "ada@hub.org", "host": "hub.org", "port": 8003}}


def kit_of(path: Path, name: str = "fed_admin.json", table: Any = ADMIN, **own: Any) -> Path:
    (path / "startup").mkdir(parents=True)
    (path / "startup" / name).write_text(json.dumps(table))
    if own:
        (path / "local").mkdir()
        (path / OWN_FILE).write_text(json.dumps(own))
    return path


def test_an_admin_is_known_by_name_and_server(tmp_path: Path) -> None:
    kit = kit_of(tmp_path / "kit", sites=["beta", "alpha"])
    expected = AdminKit(kit, "ada@hub.org", "hub.org:8003", ("alpha", "beta"))
    assert read_admin_kit(kit) == expected
    assert read_admin_kit(tmp_path) == expected, "the folder that holds the kit does as well"


def test_sites_need_not_be_written_there(tmp_path: Path) -> None:
    assert read_admin_kit(kit_of(tmp_path)).sites == ()


def test_what_is_no_kit_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no kit of NVIDIA FLARE"):
        read_admin_kit(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "role"), [("fed_server.json", "the server"), ("fed_client.json", "a site")]
)
def test_the_kit_of_another_role_is_refused(tmp_path: Path, name: str, role: str) -> None:
    with pytest.raises(InputError, match=f"is the kit of {role}; a run is submitted with an admin"):
        read_admin_kit(kit_of(tmp_path, name))


@pytest.mark.parametrize(
    ("table", "own", "said"),
    [
        ({"admin": {}}, {}, "names no user or server"),
        ([], {}, "expected a JSON object"),
        (ADMIN, {"sites": "alpha"}, "sites: expected a list of names"),
    ],
)
def test_damaged_kits_are_said(tmp_path: Path, table: Any, own: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_admin_kit(kit_of(tmp_path, table=table, **own))


def test_paths_count_from_the_kit_and_are_short(tmp_path: Path) -> None:
    kit = kit_of(tmp_path / "kit", socket="../worker.sock", runs="/srv/runs")
    assert socket_of(kit) == str(tmp_path / "worker.sock")
    assert runs_of(kit) == Path("/srv/runs")


def test_a_path_that_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give the socket of the site's worker in it"):
        socket_of(kit_of(tmp_path))


def test_the_server_may_name_the_base(tmp_path: Path) -> None:
    assert base_at_server(kit_of(tmp_path / "a")) is None
    assert base_at_server(kit_of(tmp_path / "b", model_name_or_path="/base")) == "/base"
