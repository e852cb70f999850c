"""Writes a small study, and runs it once for the tests of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlora.commands.cli import main

SHORT = ["--num_rounds", "1", "--max_steps", "1", "--max_eval_samples", "8", "--processes", "1"]


def study(tmp_path: Path, **changes: Any) -> Path:
    """A small study's file."""
    file = {
        "question": "which?",
        "metric": "loss",
        "seeds": [0, 1],
        "sizes": {
            "small": {
                "base": "embedded",
                "keys": {
                    "num_rounds": 2,
                    "max_steps": 1,
                    "max_train_samples": 16,
                    "max_eval_samples": 8,
                    "per_device_train_batch_size": 4,
                    "eval_exact_match": False,
                    "metric_for_best_model": "eval_loss",
                    "num_threads": 1,
                },
            },
            "other": {"base": "embedded", "grid": {"ranks": {"mixed": None}}},
        },
        "parts": {
            "table": {
                "title": "two rules",
                "compare": "method",
                "reference": "flora",
                "grid": {
                    "ranks": {
                        "equal": {"client_ranks": 4},
                        "mixed": {"client_ranks": [8, 8, 8, 8, 8, 4, 4, 4, 4, 4]},
                    },
                    "method": ["flora", "fedit"],
                },
            }
        },
        **changes,
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(file, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study, run."""
    here = tmp_path_factory.mktemp("study")
    path = study(here)
    arguments = ["study", str(path), "--output_dir", str(here / "out"), "--processes", "1"]
    assert main(arguments) == 0
    return here


def overrides() -> dict[str, Any]:
    return {"num_rounds": 1, "max_steps": 1, "max_eval_samples": 8, "num_threads": 1}
