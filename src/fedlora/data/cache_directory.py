"""Finds the directory in which this package keeps what later runs need not make again.

It lies beside the files of `datasets` (`HF_DATASETS_CACHE`, `HF_HOME`) under `fedlora`. Only its
owner can read it. `datasets.disable_caching()` turns it off.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_directory() -> Path | None:
    """The directory, made where it is missing; None: nothing is kept."""
    datasets = sys.modules.get("datasets")
    if datasets is None:  # importing it would take half a second; these are its rules
        from huggingface_hub.constants import HF_HOME

        of_datasets = Path(os.environ.get("HF_DATASETS_CACHE", Path(HF_HOME) / "datasets"))
    elif datasets.is_caching_enabled():
        of_datasets = Path(datasets.config.HF_DATASETS_CACHE)
    else:
        return None
    path = of_datasets / "fedlora"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_mode & 0o077:
            path.chmod(0o700)  # fails where another user owns it: then nothing is kept there
    except OSError:
        return None
    return path
