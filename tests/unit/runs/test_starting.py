"""What a run starts from where `init_adapter` names a PEFT directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedlora.adapters.saved_adapter import CONFIG_NAME, write_adapter
from fedlora.config.config import Config
from fedlora.errors import InputError
from fedlora.model.targets import Targets
from fedlora.runs.starting import from_adapter, init_notes
from support.adapters import random_lowrank

SHAPES = {"layers.0.q": (4, 3)}


class Model(nn.Module):
    """A module of layers, a head and a norm."""

    base_model_prefix = ""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(3, 4, bias=False)})])
        self.score, self.norm = nn.Linear(3, 2, bias=False), nn.LayerNorm(3)


def written(path: Path, **more: Any) -> str:
    """A PEFT directory for this model."""
    targets = Targets(
        SHAPES,
        ["q"],
        False,
        more.pop("model_name", "tiny"),
        model_config=more.pop("model_config", None),
        modules_to_save=tuple(name.rpartition(".")[0] for name in more.get("dense", {})),
    )
    write_adapter(path, {"layers.0.q": random_lowrank((4, 3), 2, 0)}, targets, **more)
    return str(path)


def test_the_update_and_what_is_trained_whole(tmp_path: Path) -> None:
    source = written(tmp_path, dense={"score.weight": torch.ones(2, 3)})
    dense = {"score.weight": torch.zeros(2, 3), "other.weight": torch.zeros(1)}
    given, out = from_adapter(source, Model(), SHAPES, dense, [])
    assert torch.equal(given["layers.0.q"].B, random_lowrank((4, 3), 2, 0).B)
    assert torch.equal(out["score.weight"], torch.ones(2, 3))
    assert torch.equal(out["other.weight"], torch.zeros(1))  # as the base has it


def test_modules_and_parameters_that_are_not_trained(tmp_path: Path) -> None:
    source = written(tmp_path, dense={"score.weight": torch.ones(2, 3)})
    with pytest.raises(
        InputError, match=r"changes layers\.0\.q \(4, 3\), which is not among .*5, 3"
    ):
        from_adapter(source, Model(), {"layers.0.q": (5, 3)}, {}, [])
    with pytest.raises(InputError, match=r"holds score\.weight \(2, 3\), .*absent\); see lora_mod"):
        from_adapter(source, Model(), SHAPES, {}, [])
    with pytest.raises(InputError, match=r"^init_adapter: .*holds no adapter_config\.json"):
        from_adapter(str(tmp_path / "absent"), Model(), SHAPES, {}, [])


def test_labels_have_to_be_the_same_in_the_same_order(tmp_path: Path) -> None:
    config = json.dumps({"id2label": {"0": "no", "1": "yes"}})
    source = written(tmp_path, model_config=config)
    from_adapter(source, Model(), SHAPES, {}, ["no", "yes"])
    with pytest.raises(InputError, match="was trained with the labels no, yes, in this order"):
        from_adapter(source, Model(), SHAPES, {}, ["yes", "no"])


def test_weights_of_another_base_are_refused(tmp_path: Path) -> None:
    model = Model()
    same = written(tmp_path / "same", base={"norm.weight": model.norm.weight.detach()})
    from_adapter(same, model, SHAPES, {}, [])
    other = written(tmp_path / "other", base={"norm.weight": torch.zeros(3)})
    with pytest.raises(InputError, match=r"brings the base's weight norm\.weight \(3,\), which is"):
        from_adapter(other, model, SHAPES, {}, [])


def test_another_name_of_the_base_is_noted(tmp_path: Path) -> None:
    source = written(tmp_path, model_name="org/tiny")
    assert init_notes(Config()) == []
    assert init_notes(Config(init_adapter=source, model_name_or_path="/models/tiny")) == []
    (note,) = init_notes(Config(init_adapter=source, model_name_or_path="org/large"))
    assert "names the base org/tiny, this run org/large" in note
    (tmp_path / CONFIG_NAME).unlink()
    assert init_notes(Config(init_adapter=source, model_name_or_path="org/large")) == []
