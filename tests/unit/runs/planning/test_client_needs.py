"""The longest rows decide how much memory is needed, and the precision of a client's base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from fedlora.config.config import Config
from fedlora.data.datasets import ClientData, FederatedData
from fedlora.errors import InputError
from fedlora.model.base import BaseModel, attach
from fedlora.model.quantisation import quantise
from fedlora.model.targets import find_targets
from fedlora.runs.planning.client_needs import ClientNeeds, longest_rows
from support.models import LLAMA

META = torch.device("meta")
ROWS = [{"input_ids": [1] * n, "labels": [1] * n} for n in (5, 9)]
DATA = FederatedData((ClientData(ROWS), ClientData(ROWS)), (), "text", {}, "")


def attached(model: Any) -> BaseModel:
    return attach(model, None, find_targets(model, "all-linear", "it", None, [], "CAUSAL_LM"))


def llama(*, quantised: bool = False) -> BaseModel:
    with META:
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    if quantised:
        quantise(model, "it", 4, torch.float32, META)
    return attached(model)


def bloom() -> BaseModel:
    """A model whose passes of several rows of different length are not packed."""
    with META:
        model = BloomForCausalLM(BloomConfig(vocab_size=100, hidden_size=32, n_layer=1, n_head=4))
    return attached(model)


def test_the_longest_rows() -> None:
    rows = [{"input_ids": [0] * n} for n in (3, 9, 1, 5)]
    assert [len(row["input_ids"]) for row in longest_rows(rows, 2)] == [5, 9]
    assert len(longest_rows(rows, 10)) == 4


def test_a_client_needs_what_its_own_precision_takes() -> None:
    config = Config(client_overrides={1: {"load_in_4bit": True}})
    needs = ClientNeeds(llama(), DATA, config, {1: llama(quantised=True)})
    full, packed = (needs.memory(client, 1, 4) for client in (0, 1))
    assert packed.weights < full.weights
    assert packed.adapter == full.adapter


def test_an_architecture_that_cannot_be_planned_is_told() -> None:
    base = bloom()
    needs = ClientNeeds(base, DATA, Config())
    with pytest.raises(InputError, match="memory of this architecture cannot be planned"):
        needs.memory(0, 2, 4)
    with pytest.raises(InputError, match="; give client_ranks as a list"):
        needs.total(0, 2, 4)
    assert not base.model.training
    assert not len(next(iter(base.layers.values())).clients)  # it was left as it was
