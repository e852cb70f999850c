"""Runs `fedlora deploy`: a folder for every participant of a federation, as an engine needs it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from fedlora.commands.deploy.deployed import Deployed
from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import Option, Syntax, take
from fedlora.config.federation_file import FederationFile, read_federation
from fedlora.errors import InputError
from fedlora.text import nearest

HELP = """\
fedlora deploy nvflare FEDERATION.yaml --output DIR [--json]
fedlora deploy flower FEDERATION.yaml --output DIR [--json]
fedlora deploy --example > FEDERATION.yaml

Makes a folder in DIR for every participant of a federation (its server, its sites, its admins): its
keys and certificates, its settings, a README.md that says who does what, and the one command that
starts it, also as a systemd unit and a container file. Whoever runs this holds the keys of the
federation while it does: hand every participant its own folder over a channel you trust, and keep
DIR itself to yourself.

  nvflare          NVIDIA FLARE carries the messages: mutual TLS, roles, signed jobs
                   (pip install 'fedlora[nvflare]')
  flower           Flower carries them: TLS, a key for each site, nginx before the SuperLink, no
                   folders for admins, whom Flower does not know (pip install 'fedlora[flower]')
  --output DIR     where the folders are made; called again with one more site or admin in
                   FEDERATION.yaml, it adds their folders and leaves the others as they are
  --example        print a federation's file with a comment on every key
  --json           one JSON object: folders (participant, kind, path, new) and notes

Example:
  fedlora deploy --example > clinics.yaml        # edit it
  fedlora deploy nvflare clinics.yaml --output clinics
  fedlora doctor --federation clinics.yaml
"""
ENGINES = {
    "nvflare": "fedlora.commands.deploy.nvflare.folders",
    "flower": "fedlora.commands.deploy.flower.folders",
}
"""Engine -> its module, with `deploy(federation, output) -> Deployed`."""

SYNTAX = Syntax(
    {
        "output": Option("where the folders are made", path="directory"),
        "example": Option("print a federation's file", flag=True),
    },
    first=Option("the engine that carries the messages", values=tuple(ENGINES)),
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora deploy`."""
    own = take(arguments, SYNTAX)
    if own["example"]:
        return _example(emit)
    if not arguments or arguments[0] not in ENGINES:
        there = f"there are {', '.join(ENGINES)}"
        if not arguments:
            raise InputError(f"deploy: give the engine that carries the messages; {there}")
        near = nearest(arguments[0], ENGINES, f"; {there}")
        raise InputError(f"{arguments[0]}: deploy knows no such engine{near}")
    if len(arguments) != 2:
        raise InputError(f"deploy {arguments[0]}: give one FEDERATION.yaml")
    if own["output"] is None:
        raise InputError(f"deploy {arguments[0]}: give --output DIR, where the folders are made")
    federation = read_federation(arguments[1])
    deploy: Callable[[FederationFile, Path], Deployed] = import_module(ENGINES[arguments[0]]).deploy
    return _show(deploy(federation, Path(own["output"])), Path(arguments[1]), emit)


def _example(emit: Emit | None) -> int:
    from fedlora.commands.deploy.example import EXAMPLE

    if emit:
        emit({"event": "example", "text": EXAMPLE})
    else:
        print(EXAMPLE, end="")
    return 0


def _show(deployed: Deployed, path: Path, emit: Emit | None) -> int:
    if emit:
        folders = [
            {"participant": f.participant, "kind": f.kind, "path": str(f.path), "new": f.new}
            for f in deployed.folders
        ]
        emit({"event": "deployed", "folders": folders, "notes": deployed.notes})
        return 0
    width = max(len(folder.participant) for folder in deployed.folders)
    for folder in deployed.folders:
        state = "made" if folder.new else "as it was"
        print(f"{folder.kind:<6}  {folder.participant:<{width}}  {folder.path}  ({state})")
    for note in deployed.notes:
        print(f"note    {note}")
    print(
        "\nGive every participant its own folder, over a channel you trust; its README.md says how "
        f"to start.\nfedlora doctor --federation {path}   # what there is to do before a run"
    )
    return 0
