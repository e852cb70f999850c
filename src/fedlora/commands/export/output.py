"""Writes an export's directory: whole or not at all, and over nothing that was not asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from fedlora.adapters.export.gguf_adapter import ADAPTER
from fedlora.adapters.export.gguf_model import MODEL
from fedlora.adapters.peft_files import CONFIG_NAME, MODEL_CONFIG_NAME
from fedlora.errors import InputError
from fedlora.runs.file_names import CONFIG


def check_output(path: Path, overwrite: bool, sources: Sequence[Path]) -> None:
    """Refuse a directory that must not be written to.

    Args:
        path: the directory to be.
        overwrite: an earlier export there may be replaced.
        sources: directories that are read.

    Raises:
        InputError: it holds something, or something that is no export, or lies around a source.
    """
    own = path.resolve()
    for source in (x.resolve() for x in sources):
        if own == source or own in source.parents:
            raise InputError(f"--output: {path} holds what is exported; choose another directory")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not path.is_dir():
        raise InputError(f"--output: {path} is a file; choose another directory")
    if not overwrite:
        raise InputError(
            f"--output: {path} is not empty; choose another directory, or --overwrite to replace it"
        )
    is_export = any(
        (path / name).is_file() for name in (CONFIG_NAME, MODEL_CONFIG_NAME, ADAPTER, MODEL)
    )
    if not is_export or (path / CONFIG).exists() or any(x.is_dir() for x in path.iterdir()):
        raise InputError(
            f"--overwrite: {path} holds no export (or more than one); it is left as it is, choose "
            "another directory"
        )


def write_whole(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a directory under another name beside it, and give it its name when all is well.

    What bears the name is removed then; whatever is raised in `fill` leaves it as it is, and
    nothing of the new one.

    Args:
        path: the directory to be.
        fill: writes and checks the directory it is given.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(
            f"--output: {path}: cannot be written: {error.strerror or error}"
        ) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
