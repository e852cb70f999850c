"""Lays out a folder for every participant of a federation that NVIDIA FLARE carries."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import replace
from pathlib import Path

from fedlora import __version__
from fedlora.commands.deploy.deployed import Deployed, Folder
from fedlora.commands.deploy.nvflare import policy, readme, scripts
from fedlora.commands.deploy.nvflare.provisioning import LONGEST_DAYS, discard_kits, provision
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

_LIBRARIES = (
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
"""Of which a participant has the versions of whoever deploys."""


def deploy(federation: FederationFile, output: Path) -> Deployed:
    """Make the folders that are not there yet; those that are keep their keys and settings.

    Raises:
        InputError: the directory holds other things, or what was handed out would have to change.
        FedloraError: the provisioning fails, or nothing can be written.
    """
    before, now = read_record(output), record_of("nvflare", federation)
    gone = check_addition(output, before, now) if before else ()
    refuse_foreign(output, before, now)
    try:
        folders, changed = _make(federation, output)
        kept = {**(before.participants if before else {}), **now.participants}
        write_record(output, replace(now, participants=kept))
    except OSError as error:
        raise FedloraError(f"{error.filename or output}: {error.strerror or error}") from None
    return Deployed(folders, (*_notes(federation, output, gone), *changed))


def _make(federation: FederationFile, output: Path) -> tuple[tuple[Folder, ...], list[str]]:
    kept = output / KEPT
    kept.mkdir(parents=True, exist_ok=True)
    os.chmod(kept, 0o700)
    kits = provision(federation, kept)
    pins = {**versions(_LIBRARIES), "fedlora": __version__}
    folders, changed = [], []
    try:
        for name, kit in kits.items():
            kind = "server" if name == "server" else "site" if name in federation.sites else "admin"
            folder = output / name
            new = not folder.exists()
            if new:
                folder.mkdir(mode=0o700)
                shutil.move(kit, folder / "kit")
            if kind == "admin":
                grown = policy.write_admin_values(folder / "kit", sorted(federation.sites))
                if grown and not new:
                    changed.append(
                        f"give {name} the new kit/local/fedlora.json, which names the new sites"
                    )
            if new:
                _fill(folder, name, kind, federation, pins)
            folders.append(Folder(name, kind, folder, new))
    finally:
        discard_kits(kits)
    return tuple(folders), changed


def _fill(
    folder: Path, name: str, kind: str, federation: FederationFile, pins: dict[str, str]
) -> None:
    """All of a new folder but its kit, and in the kit what it may do."""
    if kind == "admin":
        text = readme.admin_readme(name, federation.admins[name], federation, pins)
        (folder / "README.md").write_text(text, encoding="utf-8")
        return
    if kind == "server":
        what, start, ports = f"the server of {federation.name}", scripts.SERVER, _ports(federation)
        text = readme.server_readme(federation, pins)
        policy.write_server_policy(folder / "kit")
    else:
        what, start, ports = f"the site {name} of {federation.name}", scripts.SITE, ()
        text = readme.site_readme(name, federation, pins)
        policy.write_site_policy(folder / "kit")
        site = site_text(name, federation.name, federation.sites[name])
        (folder / "site.yaml").write_text(site, encoding="utf-8")
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "start").write_text(start, encoding="utf-8")
    (folder / "start").chmod(0o700)
    (folder / unit_name(name)).write_text(unit(name, what), encoding="utf-8")
    python = ".".join(platform.python_version_tuple()[:2])
    libraries = {library: version for library, version in pins.items() if library != "fedlora"}
    image = container_file(name, what, __version__, python, libraries, ports)
    (folder / "Containerfile").write_text(image, encoding="utf-8")


def _ports(federation: FederationFile) -> tuple[int, ...]:
    return federation.server.port, federation.server.admin_port


def _notes(federation: FederationFile, output: Path, gone: tuple[str, ...]) -> tuple[str, ...]:
    notes = [f"{output / KEPT} holds the keys of all participants: keep it to yourself"]
    if federation.certificate_days > LONGEST_DAYS:
        notes.append(
            f"certificates of participants are valid for {LONGEST_DAYS} days, as nvflare makes "
            f"them; that of the federation for {federation.certificate_days}"
        )
    notes += [
        f"{name} is no longer in the file, and its certificate goes on until it ends; to shut it "
        "out, deploy into a new directory and hand all folders out anew"
        for name in gone
    ]
    return tuple(notes)
