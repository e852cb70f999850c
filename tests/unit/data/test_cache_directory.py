"""What is kept lies beside the files of `datasets`, for its owner alone."""

from __future__ import annotations

import stat
from pathlib import Path

import datasets
import pytest

from fedlora.data.cache_directory import cache_directory


def test_its_owner_alone_can_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "new")
    path = cache_directory()
    assert path == tmp_path / "new" / "fedlora"
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o755)
    assert cache_directory() == path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    assert cache_directory() is None
    monkeypatch.setattr(datasets, "is_caching_enabled", lambda: False)
    assert cache_directory() is None
