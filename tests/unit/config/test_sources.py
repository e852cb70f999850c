"""Where keys come from: files, and the command line over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.config.sources import layered, settings


def file(directory: Path, text: str) -> Path:
    path = directory / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("layers", "keys"),
    [
        ([{"seed": 1, "name": "a"}, {"seed": 2}], {"seed": 2, "name": "a"}),
        ([{"train_file": "a"}, {"dataset_name": "b"}], {"dataset_name": "b"}),
        ([{"dataset_name": "b"}, {"train_file": "a"}], {"train_file": "a"}),
        ([{"engine": "nvflare", "kit": "k"}, {"engine": "local"}], {"engine": "local"}),
        (
            [{"engine": "sites", "sites": {"a": "b"}}, {"engine": "nvflare", "kit": "k"}],
            {"engine": "nvflare", "kit": "k"},
        ),
        ([{"kit": "k"}, {"engine": "nvflare"}], {"kit": "k", "engine": "nvflare"}),
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
