"""Models of random weights have the shape of the one that they stand for."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.errors import InputError
from fedlora.model.base import BaseModel, attach
from fedlora.model.targets import find_targets
from fedlora.runs.planning.random_model import (
    classifies,
    inner_parameters,
    layers_to_make,
    number_of_layers,
    random_model,
)
from support.models import LLAMA

CPU = torch.device("cpu")


def shapes_alone() -> BaseModel:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": 4}))
    return attach(model, None, find_targets(model, "all-linear", "it", None, [], "CAUSAL_LM"))


def test_a_whole_model() -> None:
    base = shapes_alone()
    made = random_model(base, CPU, layers=number_of_layers(base))
    assert made.targets.shapes == base.targets.shapes
    assert not any(p.is_meta for p in made.model.parameters())
    assert not classifies(made)


def test_some_layers_and_a_part_of_the_vocabulary() -> None:
    base = shapes_alone()
    made = random_model(base, CPU, layers=2, vocabulary=17, dtype=torch.bfloat16)
    assert number_of_layers(made) == 2
    assert 2 * len(made.targets.shapes) == len(base.targets.shapes)
    assert made.model.get_output_embeddings().weight.shape[0] == 17
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    assert number_of_layers(base) == 4  # it was left as it is


def test_how_many_layers_fit() -> None:
    base = shapes_alone()
    total = sum(p.numel() for p in base.model.parameters())
    assert layers_to_make(base, total) == 4
    layer = (inner_parameters(base.model)) / 4
    assert layers_to_make(base, int(total - layer)) == 3
    with pytest.raises(InputError, match="too large a model"):
        layers_to_make(base, 10)
