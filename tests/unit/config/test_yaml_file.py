"""A YAML file is read strictly: a key once, and a mapping."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.config.yaml_file import read_yaml
from fedlora.errors import InputError


def test_numbers_and_none_are_what_yaml_says(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("rate: 1.0e-3\nnothing:\n")
    assert read_yaml(path) == {"rate": 0.001, "nothing": None}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.yaml: no such configuration file"):
        read_yaml(tmp_path / "gone.yaml")
