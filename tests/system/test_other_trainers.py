"""A site whose worker trains by TRL's DPOTrainer, as its own file says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from support.one_site import ASKED, OneSite, site_file
from support.paths import REPOSITORY
from support.worker_processes import ask_cli, worker

pytestmark = pytest.mark.slow

pytest.importorskip("trl", reason="trl is not installed")


def test_a_worker_trains_as_its_file_says(tmp_path: Path) -> None:
    trainers = REPOSITORY / "examples" / "trainers"
    at = tmp_path / "clinic"
    rows = str(trainers / "preferences.jsonl")
    keys = {"train_function": "dpo:train", "socket": "s", "state_dir": "kept"}
    path = site_file(at, "embedded", rows, **keys)  # type: ignore[arg-type]
    missing = ask_cli(path)
    assert missing.returncode == 2
    assert "train_function: dpo:train: cannot be imported: ModuleNotFoundError" in missing.stderr
    shutil.copy(trainers / "dpo.py", at)
    with worker(path, str(at / "s")) as running:
        run = OneSite(running.call, asked={**ASKED, "max_length": 64})
        run.begin()
        first = run.fold(run.train())
        assert first.metrics["loss_first"] == pytest.approx(0.693147, abs=1e-4), "log 2: of DPO"
        assert first.metrics["steps"] == 2
        second = run.fold(run.train())
        assert second.metrics["loss_first"] != pytest.approx(0.693147, abs=1e-3), (
            "the reference is the base, not the model that the round began with"
        )
        assert run.evaluate().rows == 12
