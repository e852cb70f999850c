"""Writes the systemd unit of a site's worker, which may touch as little as it needs.

Where the model and the rows are files and calls come through a Unix socket, the service has no
network at all.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from fedlora.config.site import Site

_LOCAL = ("model_name_or_path", "tokenizer_name", "dataset_name")
"""Keys that may name something on a hub."""

_UNIT = """\
# Made by: fedlora worker --site {path} --install
[Unit]
Description=fedlora worker of the site {name}
StartLimitIntervalSec=600
StartLimitBurst=5

[Service]
Type=exec
User={user}
ExecStart={python} -m fedlora worker --site {site}
Restart=on-failure
RestartPreventExitStatus=2
RestartSec=10
TimeoutStopSec=30
{environment}
# What it may touch
UMask=0077
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={written}
{private_tmp}{devices}ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
RestrictNamespaces=yes
LockPersonality=yes
CapabilityBoundingSet=
SystemCallArchitectures=native
SystemCallFilter=@system-service
{network}
[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True)
class Installed:
    """A unit, and what to do with it.

    Args:
        name: of the service.
        text: of the unit.
        commands: that put it into place and start it.
    """

    name: str
    text: str
    commands: tuple[str, ...]


def unit_of(path: Path, site: Site, python: str, user: str, written_to: str | None) -> Installed:
    """The unit of a site's worker.

    Args:
        path: of the site's file.
        site: what stands in it.
        python: the interpreter that has fedlora.
        user: whom it runs as, and who may call it.
        written_to: where the unit is written; None: it is printed.
    """
    path = path.resolve()
    state, socket = Path(site.state_dir), Path(site.socket)
    written = list(dict.fromkeys((state, socket.parent)))
    places = [path, state, socket, *map(Path, _files_of(site))]
    in_tmp = any(place.is_relative_to(top) for place in places for top in ("/tmp", "/var/tmp"))
    name = f"fedlora-{re.sub(r'[^A-Za-z0-9_.-]+', '-', site.name)}.service"
    text = _UNIT.format(
        name=site.name.replace("%", "%%"),
        path=path,
        user=user,
        python=_quoted(python),
        site=_quoted(str(path)),
        environment=_environment(site, state),
        written=" ".join(_quoted(str(x)) for x in written),
        private_tmp="" if in_tmp else "PrivateTmp=yes\n",
        devices="PrivateDevices=yes\n" if site.settings.get("use_cpu") else "",
        network=_network(site),
    )
    target = f"/etc/systemd/system/{name}"
    source = written_to or name
    return Installed(
        name,
        text,
        (
            *(f"mkdir -p -m 700 {shlex.quote(str(x))}" for x in written),
            f"sudo install -m 644 {shlex.quote(source)} {target}",
            "sudo systemctl daemon-reload",
            f"sudo systemctl enable --now {name}",
            f"fedlora worker --site {shlex.quote(str(path))} --status",
        ),
    )


def is_local(site: Site) -> bool:
    """Whether all that the worker reads are files, so that it asks no hub."""
    if "model_name_or_path" not in site.settings:
        return False
    named = [site.settings[key] for key in _LOCAL if site.settings.get(key)]
    return all(name == "embedded" or os.path.exists(name) for name in named)


def _files_of(site: Site) -> list[str]:
    keys = (*_LOCAL, "train_file", "eval_file", "chat_template_path")
    return [value for key in keys if isinstance(value := site.settings.get(key), str)]


def _environment(site: Site, state: Path) -> str:
    """Caches lie where the service may write."""
    hub = "HF_HUB_OFFLINE=1" if is_local(site) else f"HF_HOME={state}/hub"
    values = f"HF_DATASETS_CACHE={state}/cache", hub
    return "".join(f"Environment={_quoted(value)}\n" for value in values)


def _network(site: Site) -> str:
    """As much of the network as the worker needs: none, the loopback, or the hub."""
    if not is_local(site):
        return "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6\n"
    if site.port is not None:
        loopback = "IPAddressDeny=any\nIPAddressAllow=localhost\n"
        return f"RestrictAddressFamilies=AF_UNIX AF_INET\n{loopback}"
    return "RestrictAddressFamilies=AF_UNIX\nPrivateNetwork=yes\n"


def _quoted(word: str) -> str:
    """A word of a unit: percent signs stand for themselves, and blanks do not part it."""
    word = word.replace("\\", "\\\\").replace("%", "%%").replace('"', '\\"')
    return f'"{word}"' if re.search(r"\s|\"", word) else word
