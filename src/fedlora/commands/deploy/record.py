"""Keeps what a federation's folders were made from, so that a later call adds to them.

It lies in `DIR/.federation`, beside what the engine's provisioning keeps there: the keys of all.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedlora.config.federation_file import FederationFile
from fedlora.errors import InputError

KEPT = ".federation"
"""The directory of the federation's own keys, and of the record."""

_RECORD = "record.json"


@dataclass(frozen=True)
class Record:
    """What the folders of a federation were made from.

    Args:
        engine: that carries its messages.
        name: of the federation.
        server: its host, ports and organization, as they stand in every participant's folder.
        certificate_days: of its certificates.
        participants: name -> what cannot change of it: its kind, organization and role.
    """

    engine: str
    name: str
    server: dict[str, str | int]
    certificate_days: int
    participants: dict[str, str] = field(default_factory=dict)


def record_of(engine: str, federation: FederationFile) -> Record:
    """What would be made of a federation now."""
    sites = {name: f"site of {site.organization}" for name, site in federation.sites.items()}
    admins = {
        name: f"{admin.role} of {admin.organization or federation.server.organization}"
        for name, admin in federation.admins.items()
    }
    return Record(
        engine,
        federation.name,
        federation.server.model_dump(),
        federation.certificate_days,
        {"server": "server", **sites, **admins},
    )


def read_record(output: Path) -> Record | None:
    """What was made in a directory before; None: nothing, and it is empty or not there.

    Raises:
        InputError: the directory holds something else, or the record cannot be read.
    """
    path = output / KEPT / _RECORD
    if path.is_file():
        try:
            return Record(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"--output {output}: holds other things, and no federation that fedlora deploy made; "
            "give a new directory"
        )
    return None


def write_record(output: Path, record: Record) -> None:
    """Keep what was made."""
    path = output / KEPT / _RECORD
    path.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")


def check_addition(output: Path, before: Record, now: Record) -> tuple[str, ...]:
    """That a federation only grows: what stands in folders already handed out does not change.

    Returns:
        Who is no longer in the file, though their certificates go on.

    Raises:
        InputError: what has changed, and what to do.
    """
    again = f"deploy into another directory than {output}, and hand all folders out anew"
    for key in ("engine", "name", "server", "certificate_days"):
        old, new = getattr(before, key), getattr(now, key)
        if old != new:
            raise InputError(
                f"{key}: is now {_short(new)}, and the folders of the participants say "
                f"{_short(old)}; {again}"
            )
    for name, what in before.participants.items():
        if name in now.participants and now.participants[name] != what:
            raise InputError(
                f"{name}: is now {now.participants[name]}, and its certificate says {what}; {again}"
            )
    return tuple(name for name in before.participants if name not in now.participants)


def refuse_foreign(output: Path, before: Record | None, now: Record) -> None:
    """Refuse to write into a participant's folder that this did not make.

    Raises:
        InputError: there is one.
    """
    made = before.participants if before else {}
    for name in now.participants:
        if name not in made and (output / name).exists():
            raise InputError(
                f"{output / name}: is there already, and fedlora deploy did not make it"
            )


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {x}" for key, x in value.items())
    return str(value)
