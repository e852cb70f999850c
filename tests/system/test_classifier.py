"""A classifier's run that is killed and resumed ends with the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import fedlora
from support.architectures import keys_of
from support.classifier import (
    WEIGHTS,
    bert,  # noqa: F401
    data,  # noqa: F401
)

KILLED = """
import os, signal, sys
import fedlora
from fedlora.engines import local
from fedlora.config.yaml_file import read_yaml

def report(event):
    if event["event"] == "round":
        report.round = event["round"]
    if event["event"] == "step" and report.round == 1 and event["client"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)

report.round = 0
fedlora.run(fedlora.Config(**read_yaml(sys.argv[1])), report=report)
"""


def test_a_killed_classifier_run_ends_with_the_same_bytes(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    keys = keys_of(
        bert, data, tmp_path / "killed", True, num_rounds=3, server_momentum=0.5, lora_dropout=0.1
    )
    config = fedlora.Config(**keys)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / "killed.py").write_text(KILLED)
    code = subprocess.run(
        [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "config.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
    )
    assert code.returncode == -signal.SIGKILL, code.stderr.decode()
    killed = tmp_path / "killed"
    assert (killed / "round-1").is_dir()
    assert not (killed / "round-2").exists()
    resumed = fedlora.run(resume=killed)
    whole = fedlora.run(fedlora.Config(**{**keys, "output_dir": str(tmp_path / "whole")}))
    assert [line["round"] for line in resumed.metrics] == [0, 0, 1, 2, 3, 3]
    for part in ("round-2", "round-3", "final"):
        for name in (WEIGHTS, "config.json", "adapter_config.json"):
            ours = (killed / part / name).read_bytes()
            assert ours == (whole.output_dir / part / name).read_bytes()
    assert resumed.evaluations == whole.evaluations
