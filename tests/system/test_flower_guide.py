"""The guide across machines for those who know Flower, as it is written: three sites, one machine.

All processes are real: SuperLink, SuperExec, nginx, three SuperNodes and three workers, which the
guide's own scripts start and end.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import fedlora
from fedlora.config.yaml_file import read_yaml
from support.courses import tensor_files
from support.flower_proxy import free_ports
from support.guide_shell import shell
from support.paths import REPOSITORY

GUIDE = REPOSITORY / "docs" / "guides" / "flower.md"
PARTICIPANTS = ("server", "alpha", "beta", "gamma")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None,
        reason="nginx is not installed (apt-get install nginx)",
    ),
]


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    """Of the part across machines: the deployment, the sites' own, the start, a run, the end."""
    text = GUIDE.read_text().partition("## Across machines")[2]
    return re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture(scope="module")
def federation(blocks: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The guide's directory while all of its processes run, on ports that are free."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_PYTHON", sys.executable)  # the environment that a user activates
        yield from running(blocks, Path(tmp_path_factory.mktemp("f")))


def running(blocks: list[str], directory: Path) -> Iterator[Path]:
    """The guide's directory; all processes end, whatever happens.

    Args:
        blocks: of the guide.
        directory: of this test; a socket's path has to be short.
    """
    ports = free_ports(5)
    make, fill_in, start, *_, end = blocks
    example, deploy = make.rsplit("fedlora deploy flower", 1)
    shell(example, directory)
    inside = directory / "federation"
    clinics = inside / "clinics.yaml"
    text = clinics.read_text().replace("8002", str(ports[0])).replace("8003", str(ports[1]))
    clinics.write_text(text)
    shell("fedlora deploy flower" + deploy, directory)
    for name, port in zip(PARTICIPANTS[1:], ports[2:], strict=True):
        script = inside / "clinics" / name / "start"
        script.write_text(re.sub(r"(FEDLORA_PORT:-)\d+", rf"\g<1>{port}", script.read_text()))
    shell(fill_in, directory)
    try:
        # In sessions of their own, so that all of them can be ended.
        shell(start.replace("    clinics/", "    setsid clinics/"), directory)
        yield inside
        shell(end, directory)
    finally:
        for name in PARTICIPANTS:
            with suppress(OSError, ValueError):
                pid = int((inside / "clinics" / name / "state" / "pid").read_text())
                os.killpg(pid, signal.SIGKILL)


def test_a_run_has_the_bytes_of_one_in_a_process(federation: Path, blocks: list[str]) -> None:
    told = shell(blocks[3], federation.parent)
    assert "exact" in told
    keys = read_yaml(federation / "server.yaml")
    del keys["server_evaluation"]
    for name in PARTICIPANTS[1:]:
        shutil.copy(federation / "clinics" / name / "rows.jsonl", federation / f"{name}.jsonl")
    result = fedlora.run(
        fedlora.Config(
            **{
                **keys,
                "train_file": str(federation / "[abg]*.jsonl"),
                "client_eval_fraction": 0.1,
                "cohort_size": 1,
                "use_cpu": True,
                "num_threads": 1,
                "output_dir": str(federation / "local"),
            }
        )
    )
    assert tensor_files(result.output_dir) == tensor_files(federation / "out")
    listed = shell("clinics/server/flwr list deployment --format json", federation.parent)
    assert "finished:completed" in listed
