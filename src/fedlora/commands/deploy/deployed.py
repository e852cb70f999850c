"""Holds what a deployment has made: a folder for each participant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """The folder of a participant.

    Args:
        participant: its name.
        kind: `server`, `site` or `admin`.
        path: of the folder.
        new: it was made now; False: it was there, and its keys are as they were.
    """

    participant: str
    kind: str
    path: Path
    new: bool


@dataclass(frozen=True)
class Deployed:
    """What was made.

    Args:
        folders: the server's, the sites' and the admins', in this order.
        notes: what the user should know.
    """

    folders: tuple[Folder, ...]
    notes: tuple[str, ...] = ()
