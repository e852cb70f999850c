"""A client's memory is told from shapes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.client.planned_memory import client_memory
from fedlora.model.base import BaseModel, attach
from fedlora.model.quantisation import quantise
from fedlora.model.quantised_linear import Bits
from fedlora.model.targets import find_targets
from support.models import LLAMA


def shapes_alone(bits: Bits | None = None) -> BaseModel:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    if bits is not None:
        quantise(model, "it", bits, torch.float32, torch.device("meta"))
    return attach(model, None, find_targets(model, "all-linear", "it", None, [], "CAUSAL_LM"))


def rows(number: int, length: int) -> list[Any]:
    ids = list(range(length))
    return [{"input_ids": ids, "labels": ids}] * number


def test_weights_adapter_and_optimiser_are_exact() -> None:
    base = shapes_alone()
    memory = client_memory(base, rows(2, 16), 4)
    trained = sum(4 * (m + n) for m, n in base.targets.shapes.values())
    assert (memory.adapter, memory.optimizer) == (4 * trained, 12 * trained)
    assert memory.weights >= 4 * sum(p.numel() for p in base.model.parameters())
    assert memory.merged == 0
    assert not len(next(iter(base.layers.values())).clients)


def test_a_rule_that_adds_to_the_base_holds_merged_copies() -> None:
    base = shapes_alone()
    merged = sum(4 * m * n for m, n in base.targets.shapes.values())
    assert client_memory(base, rows(1, 8), 1, merges=True).merged == merged


def test_a_quantised_base_takes_its_packed_bytes() -> None:
    full, packed = shapes_alone(), shapes_alone(4)
    values = sum(m * n for m, n in full.targets.shapes.values())
    of_full, of_packed = (
        client_memory(base, rows(1, 8), 2, merges=True) for base in (full, packed)
    )
    saved = of_full.weights - of_packed.weights
    # Half a byte each and a scale for every 64 of them, and what the 16 codes of a layer stand for.
    assert saved == values * (4 - 1 / 2 - 4 / 64) - 16 * 4 * len(full.targets.shapes)
    assert of_packed.merged == 0
    assert packed.num_parameters == full.num_parameters


def test_activations_grow_with_tokens_and_are_smaller_on_a_gpu() -> None:
    base = shapes_alone()
    one, four = (client_memory(base, rows(n, 64), 4).activations for n in (1, 4))
    assert 3.2 * one < four < 4.2 * one
    assert client_memory(base, rows(4, 64), 4, on_gpu=True).activations < four
