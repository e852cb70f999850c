"""Measures how many tokens a second this machine trains, with random weights of the model's shape.

No weight is read. Of a large model a few layers are made; the others count by their parameters, to
which the products of a pass are proportional.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from fedlora.lowrank import LowRank
from fedlora.model.base import BaseModel, attach
from fedlora.model.batches import count_labelled
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.passes import runner_of
from fedlora.model.targets import find_targets
from fedlora.model.torch_generator import borrowed_generator

LARGEST = 300_000_000
"""Parameters of the largest model that is made to be measured."""


@dataclass(frozen=True)
class Speed:
    """How fast this machine trains.

    Args:
        tokens: of the whole model, a second.
        seconds: that were measured.
        share: of the model's parameters outside its embeddings, those that were there.
    """

    tokens: float
    seconds: float
    share: float


def calibrate(
    base: BaseModel, batch: Sequence[Tokens], rank: int, device: torch.device, seconds: float = 10
) -> Speed:
    """Train on one batch over and over, for some seconds.

    Args:
        base: on the meta device.
        batch: tokenised rows of a micro-batch.
        rank: of the adapter.
        device: to measure.
        seconds: at least one pass is measured, however long it takes.

    Raises:
        InputError: even one layer is too large to be made for this.
    """
    made = _random_model(base, device)
    share = _inner_parameters(made.model) / _inner_parameters(base.model)
    adapter = {
        name: LowRank(torch.zeros(rank, n, device=device), torch.zeros(m, rank, device=device))
        for name, (m, n) in made.targets.shapes.items()
    }
    made.load_clients([], [ClientAdapter(adapter, full_params=made.read_full_params())])
    made.model.train()
    runner = runner_of(made.model)
    weights = [1 / max(1, count_labelled(batch))]
    runner.backward(made.model, [batch], weights)  # the first pass makes room for the others
    began, passes = time.perf_counter(), 0
    while not passes or time.perf_counter() - began < seconds:
        runner.backward(made.model, [batch], weights)
        passes += 1
    took = time.perf_counter() - began
    tokens = passes * sum(len(row["input_ids"]) for row in batch)
    return Speed(tokens / took * share, took, share)


def _random_model(base: BaseModel, device: torch.device) -> BaseModel:
    """The model with random weights, or with as many of its layers as are quickly made."""
    total = sum(p.numel() for p in base.model.parameters())
    inner = _inner_parameters(base.model)
    config = copy.deepcopy(base.model.config)
    text = config.get_text_config()
    if total > LARGEST:
        number = getattr(text, "num_hidden_layers", 1)
        layers = int((LARGEST - (total - inner)) / (inner / number))
        if layers < 1:
            raise InputError(
                "a calibration would make too large a model of random weights; take the time from "
                "the first rounds instead"
            )
        text.num_hidden_layers = min(layers, number)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
    dtype = next(p.dtype for p in base.model.parameters() if not p.requires_grad)
    kind: Any = type(base.model)
    with borrowed_generator([], 0):
        model = kind._from_config(config, dtype=dtype).to(device)
    ends = sorted({name.rpartition(".")[2] for name in base.targets.shapes})
    task = (
        "SEQ_CLS" if base.full_params and kind.__name__.endswith("Classification") else "CAUSAL_LM"
    )
    targets = find_targets(model, ends, "the model", None, list(base.targets.modules_to_save), task)
    return attach(model, base.tokenizer, targets)


def _inner_parameters(model: Any) -> int:
    """Parameters that multiply every token: all but the table of embeddings."""
    embeddings = model.get_input_embeddings()
    looked_up = sum(p.numel() for p in embeddings.parameters()) if embeddings is not None else 0
    head = model.get_output_embeddings()
    tied = head is not None and embeddings is not None and head.weight is embeddings.weight
    total: int = sum(p.numel() for p in model.parameters())
    return total if tied else total - looked_up
