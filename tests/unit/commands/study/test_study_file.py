"""What a study's file says, part by part, at one of its sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fedlora.commands.study.study_file import (
    base_keys,
    check_metric,
    part_at_size,
    read_study_file,
)
from fedlora.errors import InputError

FILE = {
    "seeds": [0, 1],
    "sizes": {
        "small": {"keys": {"num_rounds": 2}},
        "large": {"seeds": [5], "grid": {"method": {"flora": None}}},
    },
    "parts": {
        "one": {
            "grid": {"method": ["exact", "flora"]},
            "keys": {"num_rounds": 3, "max_steps": 4},
            "sizes": {"large": {"keys": {"max_steps": 9}, "title": "at large"}},
        }
    },
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    """The file on disk."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(FILE, sort_keys=False))
    return str(tmp_path / "mine.yaml")


def test_the_first_size_is_the_default_and_a_list_sets_the_key_of_the_axis(path: str) -> None:
    file = read_study_file(path, None)
    assert file.size == "small"
    part = part_at_size(file, "one", {"lora_r": 8}, "loss", None)
    assert part.called == "mine.yaml: one"
    assert part.grid == {"method": {"exact": {"method": "exact"}, "flora": {"method": "flora"}}}
    assert part.layers == [
        {"lora_r": 8},
        {"num_rounds": 2},
        {"num_rounds": 3, "max_steps": 4},
        {},
    ]
    assert part.seeds == [0, 1]
    assert part.settings["metric"] == "loss"


def test_a_size_changes_settings_and_seeds_and_leaves_values_out(path: str) -> None:
    part = part_at_size(read_study_file(path, "large"), "one", {}, "loss", None)
    assert list(part.grid["method"]) == ["exact"]
    assert part.layers[-1] == {"max_steps": 9}
    assert part.seeds == [5]
    assert part.settings["title"] == "at large"
    assert part_at_size(read_study_file(path, "large"), "one", {}, "loss", [7]).seeds == [7]


def test_a_size_and_a_metric_that_are_not_there(path: str) -> None:
    with pytest.raises(InputError, match=r"--size huge: mine\.yaml has small, large"):
        read_study_file(path, "huge")
    with pytest.raises(InputError, match="x: metric: 'speed' is not measured"):
        check_metric("x", "speed")


def test_keys_of_all_runs_may_stand_in_another_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("lora_r: 4\n")
    assert base_keys(tmp_path / "mine.yaml", "base.yaml") == {"lora_r": 4}
    assert base_keys(tmp_path / "mine.yaml", {"lora_r": 2}) == {"lora_r": 2}
    assert base_keys(tmp_path / "mine.yaml", None) == {}
    assert base_keys(tmp_path / "mine.yaml", "embedded")["model_name_or_path"] == "embedded"
