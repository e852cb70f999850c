"""Reads the file of a federation: its server, its sites with the bounds they grant, its admins.

Which engine carries the messages does not stand in it: `fedlora deploy ENGINE FEDERATION.yaml`
makes what the participants of that engine need. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field

from fedlora.config.site import SITE_KEYS, Bounds, read_bounds
from fedlora.config.table import STRICT, read_table, table
from fedlora.config.yaml_file import read_yaml
from fedlora.errors import InputError
from fedlora.text import nearest

Role = Literal["project_admin", "lead", "member"]
"""What an admin may do: all; run and stop runs; look."""

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_ADMIN = re.compile(r"[A-Za-z0-9._+-]+@[A-Za-z0-9.-]+")
_ORGANIZATION = re.compile(r"[A-Za-z0-9_]{1,60}")


class FederationServer(BaseModel):
    """Where the server is."""

    model_config = STRICT

    host: str = Field(description="name or address at which sites and admins reach it")
    port: int = Field(8002, ge=1, lt=2**16, description="that sites connect to")
    admin_port: int = Field(8003, ge=1, lt=2**16, description="that admins connect to")
    organization: str = Field("server", description="that runs it: letters, digits, _")


class FederationSite(BaseModel):
    """What is known of a site before it has a machine.

    `settings` holds those keys of its own file (`SITE_KEYS`) that are known already.
    """

    model_config = STRICT

    host: str | None = Field(None, description="name or address of its machine; none: any")
    organization: str = Field("", description="whose it is; none: the name of the site")
    bounds: Bounds = Field(
        default_factory=Bounds, description="what the server may set at most at this site"
    )
    rank: int | None = Field(None, ge=1, description="of its adapter, whatever the server asks")
    max_rank: int | None = Field(None, ge=1, description="of the rank that the server asks")
    settings: dict[str, Any] = Field(default_factory=dict)


class FederationAdmin(BaseModel):
    """Somebody who may act on the federation."""

    model_config = STRICT

    role: Role = Field(description="project_admin, lead (runs) or member (looks)")
    organization: str = Field("", description="to which they belong; none: the server's")


class FederationFile(BaseModel):
    """A federation: one server, its sites, its admins."""

    model_config = STRICT

    name: str = Field(description="of the federation: letters, digits, -")
    server: FederationServer
    sites: dict[str, FederationSite]
    admins: dict[str, FederationAdmin]
    certificate_days: int = Field(360, ge=1, le=3650, description="that a certificate is valid")


def read_federation(path: str | Path) -> FederationFile:
    """The file of a federation.

    Raises:
        InputError: it is missing or no YAML, a key is unknown, or a value is not possible.
    """
    path = Path(path)
    try:
        return _federation(read_yaml(path))
    except InputError as error:
        said = str(error)
        raise InputError(said if said.startswith(str(path)) else f"{path}: {said}") from None


def _federation(values: Mapping[str, Any]) -> FederationFile:
    parts = dict(values)
    if "server" in values:
        parts["server"] = _server(table("server", values["server"]))
    if "sites" in values:
        sites = table("sites", values["sites"])
        parts["sites"] = {str(name): _site(str(name), site) for name, site in sites.items()}
    if "admins" in values:
        admins = table("admins", values["admins"])
        parts["admins"] = {str(name): _admin(str(name), admin) for name, admin in admins.items()}
    read: FederationFile = read_table(FederationFile, "", parts)
    _fits("name", read.name, _NAME, "letters, digits and - (at most 63)")
    if not read.sites:
        raise InputError("sites: there is none; a federation has one at least")
    if not any(admin.role != "member" for admin in read.admins.values()):
        raise InputError("admins: none of them may start a run; give one the role lead")
    _refuse_taken(read)
    return read


def _server(values: Mapping[str, Any]) -> FederationServer:
    server: FederationServer = read_table(FederationServer, "server: ", values)
    _fits("server: host", server.host, _HOST, "the name or address of a machine")
    _fits("server: organization", server.organization, _ORGANIZATION, "letters, digits and _")
    if server.port == server.admin_port:
        raise InputError("server: port and admin_port are the same; give two of them")
    return server


def _site(name: str, values: Any) -> FederationSite:
    """A site's table, in which keys of the site's own file may stand too."""
    where = f"sites: {name}: "
    _fits(f"sites: {name}", name, _NAME, "letters, digits and - (at most 63)")
    values = table(where.removesuffix(": "), values)
    own = {key: value for key, value in values.items() if key not in SITE_KEYS}
    known = (*(key for key in FederationSite.model_fields if key != "settings"), *SITE_KEYS)
    for key in own:
        if key in Bounds.model_fields:
            raise InputError(f"{where}{key}: is the server's to set; limit it under `bounds`")
        if key not in known:
            others = "; fedlora worker --example shows the keys of a site"
            raise InputError(f"{where}{key}: unknown key" + nearest(str(key), known, others))
    own["bounds"] = read_bounds(f"{where}bounds: ", own.get("bounds"))
    own["settings"] = {key: value for key, value in values.items() if key in SITE_KEYS}
    site: FederationSite = read_table(FederationSite, where, own)
    if site.rank and site.max_rank:
        raise InputError(f"{where}rank and max_rank exclude each other; give one of them")
    if site.host is not None:
        _fits(f"{where}host", site.host, _HOST, "the name or address of a machine")
    organization = site.organization or re.sub(r"[^A-Za-z0-9_]", "_", name)
    _fits(f"{where}organization", organization, _ORGANIZATION, "letters, digits and _")
    return site.model_copy(update={"organization": organization})


def _admin(name: str, values: Any) -> FederationAdmin:
    """An admin's table, or the role alone."""
    where = f"admins: {name}: "
    _fits(f"admins: {name}", name, _ADMIN, "an e-mail address")
    values = {"role": values} if isinstance(values, str) else table(where[:-2], values)
    if "role" in values and values["role"] not in get_args(Role):
        raise InputError(f"{where}role: {values['role']!r}: expected {' or '.join(get_args(Role))}")
    admin: FederationAdmin = read_table(FederationAdmin, where, values)
    if admin.organization:
        _fits(f"{where}organization", admin.organization, _ORGANIZATION, "letters, digits and _")
    return admin


def _fits(where: str, value: str, pattern: re.Pattern[str], expected: str) -> None:
    if not pattern.fullmatch(value):
        raise InputError(f"{where}: {value[:70]!r}: expected {expected}")


def _refuse_taken(federation: FederationFile) -> None:
    """Refuse two participants of one name: each has a folder and a certificate of that name."""
    names = ["server", federation.server.host.lower()]
    for name in federation.sites:
        if name.lower() in names:
            raise InputError(f"sites: {name}: the name is taken; give another one")
        names.append(name.lower())
