"""Reads the kits of a provisioned federation: whose a kit is, and what fedlora keeps in it.

A kit is the directory that NVIDIA FLARE's provisioning makes for a participant. Beside what FLARE
puts there, `fedlora deploy nvflare` writes `local/fedlora.json`:

    of a site      {"socket": path}                  where its worker listens
    of the server  {"runs": path,                    where runs are kept, outside of FLARE's jobs
                    "model_name_or_path": name}      optional: the base as it is named there
    of an admin    {"sites": [name, ...]}            optional: all sites of the federation

Relative paths in it count from the kit. Standard library alone: a site's client process reads its
file too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.errors import InputError

CONTROLLER = "fedlora.engines.nvflare.controller.CourseController"
"""What a job builds at the server; the server's `class_allow_list` has to name it."""

EXECUTOR = "fedlora.engines.nvflare.executor.SiteExecutor"
"""What a job builds at a site; the site's `class_allow_list` has to name it."""

OWN_FILE = Path("local") / "fedlora.json"
"""What fedlora keeps in a kit."""

_ROLES = {
    "fed_admin.json": "an admin",
    "fed_server.json": "the server",
    "fed_client.json": "a site",
}


@dataclass(frozen=True)
class AdminKit:
    """The kit of who submits runs.

    Args:
        path: of the kit, absolute.
        user: the name in its certificate.
        server: `host:port` that it calls.
        sites: all sites of the federation, in the order of their names; empty: not written there.
    """

    path: Path
    user: str
    server: str
    sites: tuple[str, ...] = ()


def read_admin_kit(path: str | Path) -> AdminKit:
    """The kit of an admin.

    Raises:
        InputError: it is none, or is that of a server or a site.
    """
    path = Path(path)
    role = _role(path)
    if role is None:
        raise InputError(
            f"kit: {path}: is no kit of NVIDIA FLARE (it has no startup/fed_admin.json); give the "
            "directory that the federation's administrator has made for you"
        )
    if role != "an admin":
        raise InputError(f"kit: {path}: is the kit of {role}; a run is submitted with an admin's")
    admin = _table(path / "startup" / "fed_admin.json").get("admin")
    if not isinstance(admin, Mapping) or not {"username", "host", "port"} <= set(admin):
        raise InputError(f"kit: {path}: startup/fed_admin.json names no user or server")
    own = own_values(path)
    sites = own.get("sites", [])
    if not isinstance(sites, list) or not all(isinstance(name, str) for name in sites):
        raise InputError(f"kit: {path / OWN_FILE}: sites: expected a list of names")
    server = f"{admin['host']}:{admin['port']}"
    return AdminKit(path.resolve(), str(admin["username"]), server, tuple(sorted(sites)))


def socket_of(kit: Path) -> str:
    """Where a site's worker listens.

    Raises:
        InputError: its kit does not say so.
    """
    return str(_own_path(kit, "socket", "the socket of the site's worker"))


def runs_of(kit: Path) -> Path:
    """Where the server keeps runs.

    Raises:
        InputError: its kit does not say so.
    """
    return _own_path(kit, "runs", "the directory in which the server keeps runs")


def base_at_server(kit: Path) -> str | None:
    """How the server names the base; None: as the run does."""
    name = own_values(kit).get("model_name_or_path")
    return None if name is None else str(name)


def own_values(kit: Path) -> dict[str, Any]:
    """What fedlora keeps in a kit; empty where there is nothing.

    Raises:
        InputError: it cannot be read.
    """
    return _table(kit / OWN_FILE) if (kit / OWN_FILE).is_file() else {}


def _own_path(kit: Path, key: str, what: str) -> Path:
    value = own_values(kit).get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f'{kit / OWN_FILE}: give {what} in it, as {{"{key}": path}}')
    return kit / value


def _role(kit: Path) -> str | None:
    startup = kit / "startup"
    return next((role for name, role in _ROLES.items() if (startup / name).is_file()), None)


def _table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"kit: {path}: cannot be read: {error}") from None
    if not isinstance(table, dict):
        raise InputError(f"kit: {path}: expected a JSON object")
    return table
