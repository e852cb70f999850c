"""An adapter written by another process has the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fedlora.adapters.saved_adapter import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    write_adapter,
)
from fedlora.model.targets import find_targets
from support.adapters import LLAMA_LINEAR, mixed_deltas, plain_model
from support.paths import REPOSITORY

_ELSEWHERE = """
import sys
from pathlib import Path
from support.adapters import mixed_deltas, plain_model
from fedlora.adapters.saved_adapter import write_adapter
from fedlora.model.targets import find_targets
targets = find_targets(plain_model(Path(sys.argv[1])), sys.argv[3].split(","), "x")
write_adapter(Path(sys.argv[2]), mixed_deltas(targets), targets)
"""


def test_the_same_update_gives_the_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    """Also in a process that hashes otherwise, and whatever order the names are given in."""
    names = sorted(LLAMA_LINEAR)
    model = plain_model(tiny_llama)
    targets = find_targets(model, names, "x")
    write_adapter(tmp_path / "a", mixed_deltas(targets), targets)
    backwards = find_targets(model, names[::-1], "x")
    deltas = mixed_deltas(backwards)
    write_adapter(tmp_path / "b", dict(reversed(deltas.items())), backwards)
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "1"}
    here = str(REPOSITORY / "tests")
    environment["PYTHONPATH"] = os.pathsep.join([here, environment.get("PYTHONPATH", "")])
    arguments = [str(tiny_llama), str(tmp_path / "c"), ",".join(names[3:] + names[:3])]
    subprocess.run([sys.executable, "-c", _ELSEWHERE, *arguments], env=environment, check=True)
    for file in (CONFIG_NAME, WEIGHTS_NAME):
        first = (tmp_path / "a" / file).read_bytes()
        assert (tmp_path / "b" / file).read_bytes() == first
        assert (tmp_path / "c" / file).read_bytes() == first
