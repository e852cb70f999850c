"""Tells where the workers of a simulated run are called: in a directory for temporary files.

Standard library alone.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def socket_directory(run_id: int) -> Path:
    """The directory of a run's sockets; its user alone can enter it."""
    return Path(tempfile.gettempdir()) / f"fedlora-{os.getuid()}-{run_id:x}"


def socket_of(run_id: int, client: int) -> Path | None:
    """The socket of a simulated client's worker; None where there is none of this user's."""
    directory = socket_directory(run_id)
    try:
        status = directory.stat(follow_symlinks=False)
    except OSError:
        return None
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        return None  # somebody else has made it
    return directory / f"{client}.sock"


def simulated_name(client: int, number: int) -> str:
    """The name of a simulated client; names are in the order of clients."""
    return f"client-{client:0{len(str(number - 1))}d}"
