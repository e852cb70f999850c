"""Lays out a folder for every participant of a federation that Flower carries."""

from __future__ import annotations

import os
import platform
import secrets
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from fedlora import __version__
from fedlora.commands.deploy.deployed import Deployed, Folder
from fedlora.commands.deploy.flower.certificates import (
    Pair,
    authority,
    node_key,
    server_certificate,
)
from fedlora.commands.deploy.flower.readme import server_readme, site_readme
from fedlora.commands.deploy.flower.scripts import filled_in
from fedlora.commands.deploy.record import (
    KEPT,
    check_addition,
    read_record,
    record_of,
    refuse_foreign,
    write_record,
)
from fedlora.commands.deploy.service import container_file, unit, unit_name, versions
from fedlora.commands.deploy.site_file import site_text
from fedlora.config.federation_file import FederationFile
from fedlora.errors import FedloraError

_LIBRARIES = ("flwr", "torch", "transformers", "peft", "datasets", "safetensors", "numpy")
_FIRST_LOOPBACK = 9094  # Flower's own port of a SuperNode's loopback


def deploy(federation: FederationFile, output: Path) -> Deployed:
    """Make the folders that are not there yet; those that are keep their keys and settings.

    Raises:
        InputError: the directory holds other things, or what was handed out would have to change.
        FedloraError: nothing can be written.
    """
    before, now = read_record(output), record_of("flower", federation)
    gone = check_addition(output, before, now) if before else ()
    refuse_foreign(output, before, now)
    try:
        folders = _make(federation, output)
        kept = {**(before.participants if before else {}), **now.participants}
        write_record(output, replace(now, participants=kept))
    except OSError as error:
        raise FedloraError(f"{error.filename or output}: {error.strerror or error}") from None
    return Deployed(folders, _notes(federation, output, folders, gone))


def _make(federation: FederationFile, output: Path) -> tuple[Folder, ...]:
    (output / KEPT).mkdir(mode=0o700, parents=True, exist_ok=True)
    signer = _authority(federation, output / KEPT)
    folders = []
    for name in ("server", *federation.sites):
        folder = output / name
        new = not folder.exists()
        if new:
            folder.mkdir(mode=0o700)
        if name == "server" and new:
            _fill_server(folder, federation, signer)
        elif new:
            _fill_site(folder, name, federation, signer.public)
            public = (folder / "node.pub").read_bytes()
            _write(output / "server" / "sites" / f"{name}.pub", public)
        folders.append(Folder(name, "server" if name == "server" else "site", folder, new))
    return tuple(folders)


def _authority(federation: FederationFile, kept: Path) -> Pair:
    """The federation's authority, made when there is none yet."""
    private, public = kept / "ca.key", kept / "ca.crt"
    if not private.exists():
        made = authority(federation.name, federation.certificate_days)
        _write(public, made.public)
        _write(private, made.private, secret=True)
    return Pair(private.read_bytes(), public.read_bytes())


def _fill_server(folder: Path, federation: FederationFile, signer: Pair) -> None:
    server = federation.server
    values: dict[str, str | int] = {
        "FEDERATION": federation.name,
        "HOST": server.host,
        "PORT": server.port,
        "LOOPBACK": server.admin_port,
    }
    certificate = server_certificate(server.host, signer, federation.certificate_days)
    (folder / "sites").mkdir(mode=0o700)
    _write(folder / "ca.crt", signer.public)
    _write(folder / "server.crt", certificate.public)
    _write(folder / "server.key", certificate.private, secret=True)
    _write(folder / "superexec.secret", secrets.token_hex(32).encode(), secret=True)
    _write(folder / "nginx.conf", filled_in("nginx.conf", values))
    _write(folder / "start", filled_in("start-server", values), executable=True)
    _write(folder / "flwr", filled_in("flwr"), executable=True)
    _write(folder / "run", filled_in("run"), executable=True)
    _write(folder / "README.md", server_readme(federation, __version__, metadata.version("flwr")))
    _write(folder / "flower.sh", filled_in("flower.sh"))
    _write(folder / "supervise.sh", filled_in("supervise.sh"))
    _write(folder / unit_name("server"), unit("server", f"the server of {federation.name}"))


def _fill_site(folder: Path, name: str, federation: FederationFile, ca: bytes) -> None:
    server = federation.server
    values: dict[str, str | int] = {
        "FEDERATION": federation.name,
        "SITE": name,
        "HOST": server.host,
        "PORT": server.port,
        # Sites on one machine, as in a trial, get different ports.
        "LOOPBACK": _FIRST_LOOPBACK + list(federation.sites).index(name),
    }
    key = node_key()
    _write(folder / "ca.crt", ca)
    _write(folder / "node.pub", key.public)
    _write(folder / "node.key", key.private, secret=True)
    _write(folder / "site.yaml", site_text(name, federation.name, federation.sites[name]))
    _write(folder / "start", filled_in("start-site", values), executable=True)
    _write(
        folder / "README.md", site_readme(name, federation, __version__, metadata.version("flwr"))
    )
    what = f"the site {name} of {federation.name}"
    _write(folder / "flower.sh", filled_in("flower.sh"))
    _write(folder / "supervise.sh", filled_in("supervise.sh"))
    _write(folder / unit_name(name), unit(name, what))
    python = ".".join(platform.python_version_tuple()[:2])
    pins = versions(_LIBRARIES)
    _write(folder / "Containerfile", container_file(name, what, __version__, python, pins))


def _write(
    path: Path, content: str | bytes, *, secret: bool = False, executable: bool = False
) -> None:
    """Write a file that is new; a secret is its owner's alone from the first moment."""
    mode = 0o600 if secret else 0o755 if executable else 0o644
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _notes(
    federation: FederationFile, output: Path, folders: tuple[Folder, ...], gone: tuple[str, ...]
) -> tuple[str, ...]:
    notes = [
        f"{output / KEPT} holds the key of the federation's authority: keep it to yourself",
        "Flower itself knows no admins: whoever has an account on the server's machine may start "
        f"runs; these should be {', '.join(federation.admins)} alone",
    ]
    late = [f.participant for f in folders if f.new and f.kind == "site"]
    if late and not folders[0].new:
        notes.append(
            f"give the server the new sites/{', sites/'.join(f'{name}.pub' for name in late)}, and "
            "call ./start --register there"
        )
    for name in gone:
        if name in federation.admins or "@" in name:
            continue
        notes.append(
            f"{name} is no longer in the file; to shut it out, call "
            "`./flwr supernode unregister NODE-ID deployment` in the server's folder"
        )
    return tuple(notes)
