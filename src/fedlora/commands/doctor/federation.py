"""Looks at a federation from where runs are started: its file, its server, who is connected."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

from fedlora.commands.doctor.certificates import certificate_checks, credentials_of
from fedlora.commands.doctor.checks import OK, PROBLEM, WARNING, Check
from fedlora.commands.doctor.connection import clock_check, server_checks
from fedlora.commands.doctor.site import engine_check
from fedlora.config.federation_file import FederationFile
from fedlora.errors import InputError


def federation_checks(federation: FederationFile, kit: Path | None) -> Iterator[Check]:
    """A line for everything that a run needs of the federation.

    Args:
        federation: its file.
        kit: of the admin who starts runs; None: what the server says without one.
    """
    admins = [f"{name} ({admin.role})" for name, admin in federation.admins.items()]
    found = f"{federation.name}: sites {', '.join(federation.sites)}; admins {', '.join(admins)}"
    yield Check("federation", OK, found)
    yield from _bounds_checks(federation)
    yield clock_check()
    server = federation.server
    if kit is None:
        yield from server_checks(server.host, server.port, None)
        yield from server_checks(server.host, server.admin_port, None, "server for admins")
        return
    yield engine_check()
    from fedlora.engines.nvflare.kit import read_admin_kit

    try:
        admin = read_admin_kit(kit)
    except InputError as error:
        yield Check("kit", PROBLEM, str(error), "give the kit of an admin of this federation")
        return
    yield _role_check(federation, admin.user)
    own = credentials_of(kit)
    yield from certificate_checks(own, admin.user, datetime.datetime.now(datetime.UTC))
    yield from server_checks(server.host, server.port, own)
    yield from server_checks(server.host, server.admin_port, own, "server for admins")


def _bounds_checks(federation: FederationFile) -> Iterator[Check]:
    """What the sites grant, as far as the file knows."""
    open_sites = [
        name
        for name, site in federation.sites.items()
        if not site.bounds.model_dump(exclude_none=True)
    ]
    if open_sites:
        found = f"{', '.join(open_sites)}: none in the file"
        remedy = "each site decides in its own file; without bounds a server may set what it likes"
        yield Check("bounds", WARNING, found, remedy)


def _role_check(federation: FederationFile, user: str) -> Check:
    """Whether the kit's owner may start runs."""
    if user not in federation.admins:
        remedy = "add them to admins in the file, and deploy again; or give another kit"
        return Check("kit", PROBLEM, f"{user} is no admin of {federation.name}", remedy)
    role = federation.admins[user].role
    if role == "member":
        remedy = "a run is started by somebody of the role lead or project_admin"
        return Check("kit", WARNING, f"{user} is a member, and may look alone", remedy)
    return Check("kit", OK, f"{user}, {role}")
