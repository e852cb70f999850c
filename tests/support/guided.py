"""Types the lines of the guide across organisations into a shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from support.deployed import SOURCE, Deployed, free_ports
from support.paths import REPOSITORY

GUIDE = REPOSITORY / "docs" / "guides" / "organisations.md"


class Guided:
    """The guide's directory, in which its lines are typed into one shell after the other.

    Args:
        directory: in which the guide begins.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.folders = directory, directory / "federation" / "folders"
        self.deployed = Deployed(self.folders)
        self.blocks = re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
        self.port, self.admin_port = free_ports(2)
        commands = directory / "bin"
        commands.mkdir()
        nvflare = Path(sys.executable).parent / "nvflare"
        for name, code in (
            ("fedlora", f"{sys.executable} -m fedlora"),
            ("python", sys.executable),
            ("python3", sys.executable),
            ("nvflare", f"{sys.executable} {nvflare}"),
        ):
            (commands / name).write_text(f'#!/bin/sh\nexec {code} "$@"\n')
            (commands / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHONPATH": str(SOURCE),
            "HOME": str(directory),
            "OMP_NUM_THREADS": "1",
        }

    def shell(self, script: str, source: Path = SOURCE) -> str:
        """Run lines of the guide; its ports are replaced by free ones.

        Args:
            script: the lines.
            source: of the package that they run.
        """
        script = script.replace("8002", str(self.port)).replace("8003", str(self.admin_port))
        output = self.directory / "shell.out"
        with output.open("wb") as out:
            done = subprocess.run(
                ["bash", "-e", "-c", script],
                cwd=self.folders if self.folders.exists() else self.directory,
                env={**self.environment, "PYTHONPATH": str(source)},
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=1500,
            )
        assert done.returncode == 0, output.read_text()
        return output.read_text()
