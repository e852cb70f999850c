"""Files of keys, and what a broken one says."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.config.yaml_file import read_yaml
from fedlora.errors import InputError


def file(directory: Path, text: str) -> Path:
    path = directory / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = file(tmp_path, "seed: 3\nclient_ranks: [8, 4]\neval_file:\n1: one\n")
    expected = {"seed": 3, "client_ranks": [8, 4], "eval_file": None, "1": "one"}
    assert read_yaml(path) == expected


def test_an_empty_file_has_no_keys(tmp_path: Path) -> None:
    assert read_yaml(file(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nname: x\nseed: 2\n", ", line 3: seed is given twice"),
        ("seed: [1\n", ": broken YAML: "),
        ("- seed\n", ": expected 'key: value' lines, found a list"),
        ("when: 2024-13-01\n", ": broken YAML: month must be in 1..12"),
    ],
)
def test_a_broken_file_is_named_with_its_mistake(tmp_path: Path, text: str, message: str) -> None:
    path = file(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_yaml(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such configuration file"):
        read_yaml(tmp_path / "none.yaml")
