"""Writes what runs a participant as a service: a systemd unit, and a container file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata

_UNIT = """\
# The unit of {what}. Put it into place, and start it now and with the machine:
#   sed "s|@FOLDER@|$PWD|; s|@PYTHON@|$(command -v python3)|; s|@USER@|$USER|" {name} \\
#       | sudo tee /etc/systemd/system/{name}
#   sudo systemctl daemon-reload && sudo systemctl enable --now {name}
# The user's home can only be read, so that models of a hub and tokens for it lie in hub/ here.
[Unit]
Description=fedlora: {what}
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
User=@USER@
Environment=FEDLORA_PYTHON=@PYTHON@
Environment=HF_HOME=@FOLDER@/hub
WorkingDirectory=@FOLDER@
ExecStart=@FOLDER@/start
Restart=on-failure
RestartPreventExitStatus=2
RestartSec=10
TimeoutStopSec=30

# What it may touch
UMask=0077
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths=@FOLDER@
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
LockPersonality=yes
CapabilityBoundingSet=

[Install]
WantedBy=multi-user.target
"""

_CONTAINER = """\
# The image of {what}, with the versions that its federation was made with.
#   podman build -t fedlora-{image} -f Containerfile .
#   podman run --rm -v "$PWD":/participant:Z{ports} fedlora-{image}
# fedlora itself may come from a wheel that lies here: --build-arg FEDLORA=/wheels/FILE.whl
FROM docker.io/library/python:{python}-slim
ARG FEDLORA=fedlora=={fedlora}
# Of this folder the image gets wheels alone; a COPY has to find something.
COPY Containerfile *.whl /wheels/
RUN pip install --no-cache-dir "$FEDLORA" \\
{pins}
WORKDIR /participant
ENV HF_HOME=/participant/hub
STOPSIGNAL SIGTERM
CMD ["./start"]
"""


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """The versions of these libraries here; without those that are not installed."""
    found = {}
    for name in libraries:
        try:
            found[name] = metadata.version(name).partition("+")[0]  # no build of one machine
        except metadata.PackageNotFoundError:
            continue
    return found


def unit_name(participant: str) -> str:
    """Of its service."""
    return f"fedlora-{participant}.service"


def unit(participant: str, what: str) -> str:
    """The systemd unit of a server or a site.

    Args:
        participant: its name.
        what: it is, in words.
    """
    return _UNIT.format(what=what, name=unit_name(participant))


def container_file(
    participant: str,
    what: str,
    fedlora: str,
    python: str,
    pins: Mapping[str, str],
    ports: tuple[int, ...] = (),
) -> str:
    """The container file of a server or a site, with pinned versions.

    Args:
        participant: its name.
        what: it is, in words.
        fedlora: its version.
        python: its version, as `3.11`.
        pins: library -> version.
        ports: that it listens on.
    """
    published = "".join(f" -p {port}:{port}" for port in ports)
    lines = " \\\n".join(f'        "{name}=={version}"' for name, version in pins.items())
    return _CONTAINER.format(
        what=what,
        image=participant.lower(),
        fedlora=fedlora,
        python=python,
        pins=lines,
        ports=published,
    )
