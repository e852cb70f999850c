"""The PEFT boundary: directories PEFT loads, and PEFT's directories loaded; PEFT is the oracle."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from fedlora.adapters.saved_adapter import (
    write_adapter,
)
from fedlora.lowrank import scaling
from fedlora.model.targets import find_targets


def test_scaling() -> None:
    assert scaling(16, 8, False) == 2.0
    assert scaling(16, 4, True) == 8.0


def test_names_that_other_modules_end_with_too_are_written_in_full() -> None:
    """PEFT matches the ends of all modules' names: "0" would also be `blocks.0`."""
    block = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(3, 3), nn.ReLU())})
    model = nn.ModuleDict({"blocks": nn.ModuleList([block])})
    assert find_targets(model, "all-linear", "x").names == ["blocks.0.mlp.0"]


def test_the_revision_of_the_base_is_kept(tmp_path: Path) -> None:
    model = nn.ModuleDict({"up": nn.Linear(3, 3)})
    targets = find_targets(model, ["up"], "base", "v2")
    write_adapter(tmp_path, {}, targets)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["revision"] == "v2"
