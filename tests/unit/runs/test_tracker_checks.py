"""Trackers that are not there, or unknown, are refused before anything is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from fedlora.errors import InputError
from fedlora.runs import tracker_checks
from fedlora.runs.observers import observers
from fedlora.runs.tracker_checks import check_trackers
from support.trackers import (
    apart,  # noqa: F401
    configured,
)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("none", []),
        (["none"], []),
        ([], []),
        (["tensorboard", "tensorboard"], ["tensorboard"]),
        (["trackio", "tensorboard"], ["trackio", "tensorboard"]),
    ],
)
def test_names(wanted: Any, names: list[str]) -> None:
    assert check_trackers(configured(wanted)) == names


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'tensorbord' is none of .*; did you mean tensorboard\?"):
        check_trackers(configured(["wandb", "tensorbord"]))
    with pytest.raises(InputError, match="mlflow"), observers(configured("mlflow"), tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []  # before anything is written


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tracker_checks.find_spec
    monkeypatch.setattr(tracker_checks, "find_spec", lambda n: None if n == "wandb" else real(n))
    with pytest.raises(InputError, match=r"wandb is not installed; pip install 'fedlora\[tracke"):
        check_trackers(configured("wandb"))
    assert check_trackers(configured("all")) == ["tensorboard", "trackio"]


def test_broken_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match="trackio"):
        check_trackers(configured("trackio"))
