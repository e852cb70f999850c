"""Runs NVIDIA FLARE's own provisioning: a certificate, a key and a kit for every participant."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from fedlora.config.federation_file import FederationFile
from fedlora.errors import FedloraError, InputError

WORKSPACE = "workspace"
"""Below the directory of the federation's keys: what the provisioning keeps between calls."""

LONGEST_DAYS = 360
"""Days that a participant's certificate is valid, whatever those of the federation are."""


def project(federation: FederationFile) -> dict[str, Any]:
    """The federation as NVIDIA FLARE's project file has it."""
    server = federation.server
    participants: list[dict[str, Any]] = [
        {
            "name": server.host,
            "type": "server",
            "org": server.organization,
            "fed_learn_port": server.port,
            "admin_port": server.admin_port,
        }
    ]
    for name, site in federation.sites.items():
        participants.append({"name": name, "type": "client", "org": site.organization})
    for name, admin in federation.admins.items():
        organization = admin.organization or server.organization
        participants.append(
            {"name": name, "type": "admin", "org": organization, "role": admin.role}
        )
    builders = "nvflare.lighter.impl"
    return {
        "api_version": 3,
        "name": federation.name,
        "description": f"Made by fedlora deploy for the federation {federation.name}",
        "participants": participants,
        "builders": [
            {
                "path": f"{builders}.workspace.WorkspaceBuilder",
                "args": {"template_file": ["master_template.yml"]},
            },
            {
                "path": f"{builders}.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "scheme": "grpc"},
            },
            {
                "path": f"{builders}.cert.CertBuilder",
                "args": {"root_valid_days": federation.certificate_days},
            },
            {"path": f"{builders}.signature.SignatureBuilder"},
        ],
    }


def provision(federation: FederationFile, kept: Path) -> dict[str, Path]:
    """Provision a federation; who was provisioned before keeps key and certificate.

    Args:
        federation: all of it.
        kept: directory of the federation's keys; the project file is written there as well.

    Returns:
        Participant -> its kit, to be moved from there; the server under `server`.

    Raises:
        InputError: nvflare is not installed, or refuses a name.
        FedloraError: the provisioning fails.
    """
    try:
        from nvflare.lighter.provision import prepare_builders, prepare_project
        from nvflare.lighter.provisioner import Provisioner
    except ImportError:
        raise InputError("deploy nvflare: needs nvflare: pip install 'fedlora[nvflare]'") from None
    wanted = project(federation)
    kept.mkdir(parents=True, exist_ok=True)
    os.chmod(kept, 0o700)
    (kept / "project.yml").write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
    log, printed = _Log(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            built = Provisioner(str(kept / WORKSPACE), prepare_builders(wanted)).provision(
                prepare_project(wanted), logger=log
            )
        except (ValueError, RuntimeError) as error:
            raise InputError(f"deploy nvflare: {error}") from None
    kits = built.get("current_prod_dir")
    if log.errors or not kits:
        why = "; ".join(log.errors) or printed.getvalue().strip()
        raise FedloraError(f"deploy nvflare: the provisioning failed: {why}")
    names = {"server": federation.server.host}
    names |= {name: name for name in (*federation.sites, *federation.admins)}
    return {name: Path(kits) / folder for name, folder in names.items()}


def discard_kits(kits: dict[str, Path]) -> None:
    """Remove what was provisioned and is in no folder."""
    for parent in {kit.parent for kit in kits.values()}:
        shutil.rmtree(parent, ignore_errors=True)


class _Log:
    """Keeps the errors that the provisioning logs, and nothing else of its talk."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def error(self, message: str) -> None:
        self.errors.append(message)

    def info(self, message: str) -> None: ...

    debug = warning = info
