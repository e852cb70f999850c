"""Every Python of this machine that the package claims compiles its sources without a warning."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CLAIMED = [
    line.rpartition(" ")[2]
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    if line.startswith("Programming Language :: Python :: 3.")
]


def interpreter(version: str) -> str | None:
    """A Python of this version that runs: on the path, or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    found = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python")]
    for python in map(str, filter(None, found)):
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return python
    return None


@pytest.mark.parametrize("version", CLAIMED)
def test_sources_compile(version: str, tmp_path: Path) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    command = [python, "-W", "error", "-X", f"pycache_prefix={tmp_path}", "-m", "compileall"]
    done = subprocess.run(
        [*command, "-q", str(ROOT / "src")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
