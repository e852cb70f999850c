"""The directory of cached tokens is that of datasets, whatever is imported first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "variables",
    [{}, {"HF_DATASETS_CACHE": "here"}, {"HF_HOME": "home"}, {"XDG_CACHE_HOME": "cache"}],
)
def test_the_directory_is_that_of_datasets(variables: dict[str, str], tmp_path: Path) -> None:
    """Whether or not it was imported before."""
    code = (
        "from fedlora.data.cache_directory import cache_directory as d; import sys; a = d();"
        "assert 'datasets' not in sys.modules; import datasets; assert a == d();"
        "print(a.relative_to(sys.argv[1]))"
    )
    names = ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    environment |= {k: str(tmp_path / v) for k, v in variables.items()} | {"HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = {
        "HF_DATASETS_CACHE": "here/fedlora",
        "HF_HOME": "home/datasets/fedlora",
        "XDG_CACHE_HOME": "cache/huggingface/datasets/fedlora",
    }
    name = next(iter(variables), "")
    assert found.stdout.strip() == wanted.get(name, ".cache/huggingface/datasets/fedlora")
