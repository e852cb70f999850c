"""Writes pictures by matplotlib: PNG, SVG or PDF by the file's ending."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from fedlora.errors import InputError

PICTURES = (".png", ".svg", ".pdf")


def check_picture(path: str, option: str = "--output") -> Path:
    """A file that a picture can be written to.

    Args:
        path: as it was given.
        option: by which it was given, for messages.

    Raises:
        InputError: another ending, or no such directory.
    """
    file = Path(path)
    if file.suffix not in PICTURES:
        raise InputError(f"{option} {path}: a picture's name ends in {', '.join(PICTURES)}")
    if file.is_dir():
        raise InputError(f"{option} {path}: is a directory")
    if not file.parent.is_dir():
        raise InputError(f"{option} {path}: there is no directory {file.parent}")
    return file


def pyplot() -> Any:
    """matplotlib's pyplot, which draws into files and opens no window."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure: Any, path: Path, option: str = "--output") -> None:
    """Write a figure.

    Args:
        figure: of matplotlib.
        path: of `check_picture`.
        option: by which it was given, for messages.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(path, bbox_inches="tight", dpi=150)
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written: {error.strerror}") from None
