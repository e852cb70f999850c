"""Looking before running, as a user types it: partition, data, run --dry_run: whole runs."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedlora.commands.cli import main
from fedlora.config.sources import read_yaml
from support.views import Say, _offline, _signals_as_they_were, here, say  # noqa: F401


def test_a_plan_reads_no_weights(say: Say, here: Path) -> None:
    model = here / "model"
    shutil.copytree(read_yaml(here / "my.yaml")["model_name_or_path"], model)
    whole = say("run my.yaml --dry_run --model_name_or_path model")
    (model / "model.safetensors").unlink()
    assert say("run my.yaml --dry_run --model_name_or_path model") == whole
    assert say("run my.yaml --dry-run --model_name_or_path=model") == whole
    assert "no weights were read and nothing was written" in " ".join(whole.split())
    assert main(["run", "my.yaml", "--model_name_or_path", "model"]) == 2
