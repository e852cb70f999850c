"""The speed of this machine is measured with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.errors import InputError
from fedlora.model.base import BaseModel, attach
from fedlora.model.targets import find_targets
from fedlora.runs.planning import calibration
from support.models import LLAMA

IDS = list(range(16))
BATCH = [{"input_ids": IDS, "labels": IDS}]


def shapes_alone() -> BaseModel:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    return attach(model, None, find_targets(model, "all-linear", "it", None, [], "CAUSAL_LM"))


def test_a_small_model_is_measured_whole() -> None:
    speed = calibration.calibrate(shapes_alone(), BATCH, 2, torch.device("cpu"), 0)
    assert speed.share == 1
    assert speed.tokens > 0


def test_a_large_one_with_fewer_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    base = shapes_alone()
    total = sum(p.numel() for p in base.model.parameters())
    monkeypatch.setattr(calibration, "LARGEST", total - 1)
    speed = calibration.calibrate(base, BATCH, 2, torch.device("cpu"), 0)
    assert 0.4 < speed.share < 1
    monkeypatch.setattr(calibration, "LARGEST", 10)
    with pytest.raises(InputError, match="take the time from the first rounds"):
        calibration.calibrate(base, BATCH, 2, torch.device("cpu"), 0)


def test_activations_are_recomputed_where_a_run_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[BaseModel] = []
    make = calibration.random_model

    def noted(*arguments: Any, **named: Any) -> BaseModel:
        made.append(make(*arguments, **named))
        return made[-1]

    monkeypatch.setattr(calibration, "random_model", noted)
    cpu = torch.device("cpu")
    for wanted in (False, True):
        calibration.calibrate(shapes_alone(), BATCH, 2, cpu, 0, gradient_checkpointing=wanted)
    assert [base.model.is_gradient_checkpointing for base in made] == [False, True]
