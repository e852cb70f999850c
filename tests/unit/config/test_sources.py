"""Where keys come from: files, and the command line over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.config.sources import layered, read_yaml, settings
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


@pytest.mark.parametrize(
    ("layers", "keys"),
    [
        ([{"seed": 1, "name": "a"}, {"seed": 2}], {"seed": 2, "name": "a"}),
        ([{"train_file": "a"}, {"dataset_name": "b"}], {"dataset_name": "b"}),
        ([{"dataset_name": "b"}, {"train_file": "a"}], {"train_file": "a"}),
        (
            [{"dataset_name": "b"}, {"train_file": "a", "dataset_name": None}],
            {"train_file": "a", "dataset_name": None},
        ),
    ],
)
def test_later_layers_go_over_earlier_ones(
    layers: list[dict[str, Any]], keys: dict[str, Any]
) -> None:
    assert layered(*layers) == keys


def test_the_command_line_goes_over_the_file(tmp_path: Path) -> None:
    path = file(tmp_path, "seed: 3\nnum_rounds: 2\n")
    assert settings([str(path), "--seed", "4"], None) == {"seed": "4", "num_rounds": 2}
    assert settings(["--seed", "4"], str(path)) == {"seed": "4", "num_rounds": 2}
    assert settings(["--seed", "4"], None) == {"seed": "4"}


def test_the_embedded_configuration_is_not_that_of_another_model() -> None:
    assert settings([], "embedded")["model_name_or_path"] == "embedded"
    other = settings(["--model_name_or_path", "mine"], "embedded")
    assert other == {"model_name_or_path": "mine"}
