"""Runs lines of a guide as a shell does that a person types them into."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.paths import REPOSITORY


def shell(script: str, directory: Path) -> str:
    """Run lines of the guide as a shell does that a person types them into."""
    bin_directory = directory / "bin"
    if not bin_directory.exists():
        bin_directory.mkdir()
        for name, code in (("fedlora", "-m fedlora"), ("python", "")):
            (bin_directory / name).write_text(f'#!/bin/sh\nexec {sys.executable} {code} "$@"\n')
            (bin_directory / name).chmod(0o755)
    inside = directory / "federation"
    done = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=inside if inside.exists() else directory,
        env={
            **os.environ,
            "PATH": f"{bin_directory}:{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY / "src"),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
