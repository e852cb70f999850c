"""Writes the README.md of a participant's folder: who does what, and what leaves the machine."""

from __future__ import annotations

from fedlora.commands.deploy.service import unit_name
from fedlora.commands.deploy.site_file import FILL_IN
from fedlora.config.federation_file import FederationFile

_INSTALL = """\
Python 3.11 or later, and

    pip install 'fedlora[flower]'

of the version that all of the federation have: {fedlora} with flwr {flwr}.
"""

_START = """\
    ./start

It stays in the foreground and starts again what ends by itself; what each process says lies in
`logs`. `{unit}` is a systemd unit, whose first lines say how to put it into place.
"""

_SITE = """\
# {name}: a site of the federation {federation}

Your rows stay on this machine. What leaves it: adapters, counts of rows and tokens, and
metrics. What comes in: the global adapter, and what to train with, within your bounds. Your
machine calls the server {host}:{port} (TLS); it opens no port to others itself.

## What you decide

`site.yaml`: which rows, which base model, and what the server may set at most (`bounds`). Lines
with "{fill_in}" wait for you. The server is refused what is beyond your bounds, before anything
is trained.

**A server of Flower sends the program that a SuperNode runs** (its ClientApp), and whoever
starts runs at the server can send another one than fedlora's. So whom the server belongs to has
to have your trust as if they had an account on this machine. Run this folder as a user of its
own, who may read the rows and nothing else, or in its container.

## What you do

{install}
    fedlora doctor --site site.yaml     # is all ready, and what to do where not

{start}
`Containerfile` makes an image of it, with pinned versions.

    fedlora worker --site site.yaml --status     # what it is at

To leave for good, stop it. Its state lies in `state`.

## Keys

`node.key` is your SuperNode's private key (ECDSA, P-384): by it the server knows you. `ca.crt`
is the certificate by which you know the server. Keep this folder to yourself, and copy it to no
other machine.
"""

_SERVER = """\
# The server of the federation {federation}

It adds up what the sites send, and holds no rows. It sees every site's adapter, its counts and
its metrics. Sites call port {port} of {host}: let it through.

## What listens where

| address | what | who reaches it |
|---|---|---|
| `0.0.0.0:{port}` | nginx: `POST /v1/fleet/...`, everything else is refused (403) | the sites |
| `127.0.0.1:{loopback}` | Flower's SuperLink: Fleet, Control and Runtime API | this machine alone |

**The Control API of Flower's open build has no authentication, and shares the SuperLink's
port.** Whoever reaches it runs code on this machine and at every site. So never let port
{loopback} through, and give nobody an account on this machine who should not start runs.
`nginx.conf` is what keeps them apart; `fedlora` made it and tests it.

## What you do

{install}
and nginx, which is a package of the system (`apt-get install nginx`). Then

{start} It lets in the sites whose keys lie in `sites`. A site that joins later: copy its
`NAME.pub` there and call `./start --register`.

    ./run server.yaml                   # a run of fedlora: progress, and the result in output_dir
    ./flwr supernode list deployment    # who is there
    ./flwr list deployment              # which runs there were
    ./flwr log RUN-ID deployment        # what one of them said

`./run` is `fedlora run --engine flower`, `./flwr` Flower's command line, both with this folder's
connection, `deployment`. `state` holds the
SuperLink's database: a SuperLink that ends is started again and goes on with the run.

## Keys

`server.key` is the server's private key, `server.crt` its certificate for {host} (signed by the
federation's own authority, valid for {days} days), `superexec.secret` what the SuperExec shows
the SuperLink. Keep this folder to yourself.
"""


def site_readme(name: str, federation: FederationFile, fedlora: str, flwr: str) -> str:
    """Of a site's folder; with the versions of fedlora and flwr."""
    return _SITE.format(
        name=name,
        federation=federation.name,
        host=federation.server.host,
        port=federation.server.port,
        fill_in=FILL_IN,
        install=_INSTALL.format(fedlora=fedlora, flwr=flwr),
        start=_START.format(unit=unit_name(name)),
    )


def server_readme(federation: FederationFile, fedlora: str, flwr: str) -> str:
    """Of the server's folder; with the versions of fedlora and flwr."""
    return _SERVER.format(
        federation=federation.name,
        host=federation.server.host,
        port=federation.server.port,
        loopback=federation.server.admin_port,
        days=federation.certificate_days,
        install=_INSTALL.format(fedlora=fedlora, flwr=flwr),
        start=_START.format(unit=unit_name("server")),
    )
