"""Writes the README.md of a participant's folder: who does what, and what leaves the machine."""

from __future__ import annotations

from fedlora.commands.deploy.service import unit_name
from fedlora.commands.deploy.site_file import FILL_IN
from fedlora.config.federation_file import FederationAdmin, FederationFile

_INSTALL = """\
Python 3.11 or later, and

    pip install 'fedlora[nvflare]'

of the version that all of the federation have: {fedlora} with nvflare {nvflare}. The classes
that a run needs come with that package; a run itself brings no code, and this folder's settings
refuse any that would (`class_allow_list`, and no role has the right `byoc`).
"""

_START = """\
    ./start

It stays in the foreground. To have it start with the machine, there is a systemd unit, whose first
lines say how to put it into place: `{unit}`. `Containerfile` makes an image with pinned versions.
"""

_KEYS = """\
`kit/startup` holds your private key and your certificate: keep this folder to yourself (no other
user may read it) and copy it to no other machine. The certificate of the federation ends {days}
days after it was made; `fedlora doctor` says when yours does.
"""

_SITE = """\
# {name}: a site of the federation {federation}

Your rows stay on this machine. What leaves it: adapters, counts of rows and tokens, and metrics.
What comes in: the global adapter, and what to train with, within your bounds. Your machine calls
the server {host}:{port}; it opens no port itself.

## What you decide

`site.yaml`: which rows, which base model, and what the server may set at most (`bounds`). Lines
with "{fill_in}" wait for you. The server is refused what is beyond your bounds, before anything
is trained.

## What you do

{install}
    fedlora doctor --site site.yaml              # in this folder: is all ready, and what to do

{start}
    fedlora worker --site site.yaml --status     # what it is at
    fedlora worker --site site.yaml --stop       # end it; ./start ends with it

To leave for good, stop it. Its state lies in `state`, and what it does in `worker.log` and
`client.log`.

## Keys

{keys}"""

_SERVER = """\
# The server of the federation {federation}

It adds up what the sites send, and holds no rows. It sees every site's adapter, its counts and
its metrics, and the configuration of every run. Sites call port {port} and admins port
{admin_port} of {host}: let both through. {binding}

## What you do

{install}
The server needs the base model's shapes and tokenizer, no weights unless it evaluates. If the
base has another name or place here than in the runs, add it to `kit/local/fedlora.json`:
`"model_name_or_path": "/models/base"`.

{start}
Runs are kept in `runs`, outside of the engine's own files: a run that was cut off goes on from
there. `storage` holds the engine's jobs, `server.log` what it says, `kit/audit.log` who did
what.

## Keys

{keys}"""

_ADMIN = """\
# {name}: {role} of the federation {federation}

{rights}

## What you do

{install}
A run is described in a configuration, as any run of fedlora. This submits it, shows its progress
and fetches the result:

    fedlora run server.yaml --engine nvflare --kit {folder}/kit
    fedlora doctor --federation FEDERATION.yaml --kit {folder}/kit

The sites: {sites}. How a site trains is limited by its own bounds; a run that asks for more is
refused before anything is trained, and says which site refuses what.

## Keys

{keys}"""

_RIGHTS = {
    "project_admin": "You may start and stop all runs, fetch results, and end the federation.",
    "lead": "You may start runs, stop your own and fetch their results.",
    "member": "You may look at what goes on. You cannot start a run.",
}


def site_readme(name: str, federation: FederationFile, pins: dict[str, str]) -> str:
    """Of a site's folder; `pins` are the versions of libraries and of fedlora."""
    return _SITE.format(
        name=name,
        federation=federation.name,
        host=federation.server.host,
        port=federation.server.port,
        fill_in=FILL_IN,
        install=_INSTALL.format_map(pins),
        start=_START.format(unit=unit_name(name)),
        keys=_KEYS.format(days=federation.certificate_days),
    )


def server_readme(federation: FederationFile, pins: dict[str, str]) -> str:
    """Of the server's folder."""
    local = federation.server.host == "localhost"
    return _SERVER.format(
        federation=federation.name,
        host=federation.server.host,
        port=federation.server.port,
        admin_port=federation.server.admin_port,
        binding="It listens on 127.0.0.1 alone." if local else "It listens on all its addresses.",
        install=_INSTALL.format_map(pins),
        start=_START.format(unit=unit_name("server")),
        keys=_KEYS.format(days=federation.certificate_days),
    )


def admin_readme(
    name: str, admin: FederationAdmin, federation: FederationFile, pins: dict[str, str]
) -> str:
    """Of an admin's folder."""
    return _ADMIN.format(
        name=name,
        role=admin.role,
        federation=federation.name,
        rights=_RIGHTS[admin.role],
        folder=name,
        sites=", ".join(federation.sites),
        install=_INSTALL.format_map(pins),
        keys=_KEYS.format(days=federation.certificate_days),
    )
