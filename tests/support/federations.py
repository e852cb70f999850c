"""Holds a small federation's file, and the folders that are deployed of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fedlora.config.federation_file import FederationFile, read_federation

LEAD, MEMBER = "ada@example.org", "bob@example.org"

SMALL: dict[str, Any] = {
    "name": "clinics",
    "server": {"host": "localhost", "port": 18002, "admin_port": 18003},
    "sites": {"alpha": {"bounds": {"lora_r": 16}, "train_file": "rows.jsonl"}},
    "admins": {LEAD: "lead"},
}


def federation_file(path: Path, **changed: Any) -> Path:
    """A federation's file with some keys changed."""
    path.write_text(yaml.safe_dump({**SMALL, **changed}, sort_keys=False))
    return path


def federation_of(directory: Path, **changed: Any) -> FederationFile:
    """The same, read."""
    return read_federation(federation_file(directory / "federation.yaml", **changed))


def files_of(directory: Path) -> dict[str, bytes]:
    """Relative path -> content of every file below."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}
