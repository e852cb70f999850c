"""A run that measures how it trains fastest keeps the choice, and ends in the same bytes again."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest

import fedlora
from fedlora import Config
from fedlora.runs import measured_choice
from fedlora.runs.planning import kept_choices, trial_training
from fedlora.runs.planning.fastest_way import Race

pytestmark = pytest.mark.slow


@pytest.fixture
def keys(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """A run that counts as long, with everything open, whose choices are kept in a fresh place."""
    monkeypatch.setattr(measured_choice, "SHARE", 1e9)
    monkeypatch.setattr(measured_choice, "MOST_SECONDS", 120.0)  # a busy machine measures as much
    monkeypatch.setattr(trial_training, "PATIENCE", 60.0)
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(kept_choices, "cache_directory", lambda: kept)
    return {**small_run, "num_threads": None, "use_cpu": True, "eval_file": None}


def run(config: dict[str, Any], name: str, **options: Any) -> tuple[Path, list[str]]:
    choices = list[str]()

    def report(event: Any) -> None:
        if event["event"] == "begin":
            choices.extend(event["choices"])

    out = Path(config["output_dir"]).with_name(name)
    fedlora.run(Config(**{**config, "output_dir": str(out)}), report=report, **options)
    return out, choices


def stop(_: Any) -> None:
    raise KeyboardInterrupt


def weights(out: Path) -> bytes:
    return (out / "final" / "adapter_model.safetensors").read_bytes()


def settled(out: Path) -> list[str]:
    """The lines of a run's configuration that a measurement decides."""
    decided = ("dtype:", "num_threads:", "cohort_size:", "engine:", "num_workers:")
    return [x for x in (out / "config.yaml").read_text().splitlines() if x.startswith(decided)]


def test_the_choice_is_kept_by_the_run_and_for_others(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, choices = run(keys, "whole")
    assert [x for x in choices if x.startswith("measured in ")]

    def never(race: Race) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Race, "run", never)
    with pytest.raises(KeyboardInterrupt):
        run(keys, "broken-off", callbacks=[stop])
    out = whole.with_name("broken-off")
    assert settled(out) == settled(whole)

    # Neither the cache nor what is open matters to a run that has begun.
    monkeypatch.setattr(kept_choices, "read", lambda name: pytest.fail("looked up again"))
    fedlora.run(Config(**{**keys, "output_dir": str(out)}), resume=out)
    assert settled(out) == settled(whole)
    assert weights(out) == weights(whole)

    # The configuration in the directory gives the same bytes in a new run.
    fixed = Config(**{**_values(whole), "output_dir": str(whole.with_name("again"))})
    assert weights(fedlora.run(fixed).output_dir) == weights(whole)


def _values(out: Path) -> dict[str, Any]:
    from fedlora.config.yaml_file import read_yaml

    return read_yaml(out / "config.yaml")


def test_a_model_that_cannot_be_tried_is_run_by_the_rules(
    keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial_training, "QUICK", 1.0)
    out, choices = run(keys, "ruled")
    told = "ways to train were not compared: a step of this model takes too long to be tried"
    assert told in choices
    assert weights(out)


def test_processes_that_take_a_step_at_the_same_time() -> None:
    parent = os.getpid()
    beside = trial_training.beside_each_other
    assert beside(lambda: 0.25, 2, 60.0) == 0.25
    assert beside(lambda: float(os.getpid() != parent), 2, 60.0) == 1.0
    assert beside(lambda: 1 / 0, 2, 60.0) == math.inf
