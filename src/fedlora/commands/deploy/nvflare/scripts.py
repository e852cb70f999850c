"""Writes how a participant starts: one command, a systemd unit, a container file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

_PYTHON = """\
cd "$(dirname "${BASH_SOURCE[0]}")"

# The Python that has fedlora: that of the active environment, or FEDLORA_PYTHON=/path/to/python.
python="$(command -v "${FEDLORA_PYTHON:-python3}" || true)"
if [ -z "$python" ] || ! "$python" -c 'import fedlora, nvflare' 2>/dev/null; then
    echo "start: ${python:-${FEDLORA_PYTHON:-python3}} has no fedlora[nvflare]: activate the" \\
        "environment that has it, or set FEDLORA_PYTHON" >&2
    exit 2
fi
PATH="$(dirname "$python"):$PATH"   # the scripts of the kit call python3
export PATH
umask 077
"""

SITE = f"""\
#!/usr/bin/env bash
# Starts this site: the worker beside its rows, and the client that connects to the server.
# It stays in the foreground; Ctrl-C or SIGTERM ends both. Their output: worker.log, client.log.
set -uo pipefail
{_PYTHON}
"$python" -m fedlora worker --site site.yaml >>worker.log 2>&1 &
worker=$!
client=
end() {{
    trap - INT TERM EXIT
    kill -TERM $client $worker 2>/dev/null
    wait
    exit "$1"
}}
trap 'end 0' INT TERM
trap 'end 1' EXIT
# The worker starts itself again when it crashes; the client is started again here. It ends with 0
# when an admin has shut the federation down.
while true; do
    bash kit/startup/sub_start.sh --once >>client.log 2>&1 &
    client=$!
    wait -n $client $worker
    code=$?
    if ! kill -0 $worker 2>/dev/null; then
        echo "start: the worker has ended; its last words in worker.log:" >&2
        tail -n 3 worker.log >&2
        end 1
    fi
    [ $code = 0 ] && end 0
    echo "start: the client has ended with code $code; it is started again (client.log)" >&2
    sleep 5
done
"""

SERVER = f"""\
#!/usr/bin/env bash
# Starts the server of the federation. It stays in the foreground; Ctrl-C or SIGTERM ends it.
# Its output: server.log.
set -euo pipefail
{_PYTHON}
mkdir -p runs storage/jobs storage/snapshots
sed "s|@FOLDER@|$PWD|g" kit/local/resources.json.in > kit/local/resources.json
exec bash kit/startup/sub_start.sh --once >>server.log 2>&1
"""

_UNIT = """\
# The unit of {what}. Put it into place, and start it now and with the machine:
#   sed "s|@FOLDER@|$PWD|; s|@PYTHON@|$(command -v python3)|; s|@USER@|$USER|" {name} \\
#       | sudo tee /etc/systemd/system/{name}
#   sudo systemctl daemon-reload && sudo systemctl enable --now {name}
[Unit]
Description=fedlora: {what}
Wants=network-online.target
After=network-online.target

[Service]
Type=exec
User=@USER@
Environment=FEDLORA_PYTHON=@PYTHON@
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
#   podman run --rm -v "$PWD":/participant{ports} fedlora-{image}
# fedlora itself may come from elsewhere: --build-arg FEDLORA=/participant/fedlora.whl, for one.
FROM docker.io/library/python:{python}-slim
ARG FEDLORA=fedlora=={fedlora}
RUN pip install --no-cache-dir "$FEDLORA" \\
{pins}
WORKDIR /participant
ENV HF_HOME=/participant/hub
STOPSIGNAL SIGTERM
CMD ["./start"]
"""

_PINNED = (
    "nvflare",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "numpy",
    "pyarrow",
    "pydantic",
    "protobuf",
    "grpcio",
)


def versions() -> dict[str, str]:
    """Of the libraries that a participant runs; those of whoever deploys."""
    found = {}
    for name in _PINNED:
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
