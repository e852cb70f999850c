"""Paths of a configuration are absolute, so that a run can be resumed from anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.config.config import Config
from fedlora.runs.absolute_paths import resolve_paths


def test_paths_are_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = resolve_paths(
        Config(
            model_name_or_path="model",
            tokenizer_name="a/hub-name",
            engine="sites",
            sites={"a": "a.sock", "b": "/run/b.sock"},
        )
    )
    assert config.model_name_or_path == str(tmp_path / "model")
    assert config.tokenizer_name == "a/hub-name"
    assert config.sites == {"a": str(tmp_path / "a.sock"), "b": "/run/b.sock"}
    assert resolve_paths(Config()).sites is None
