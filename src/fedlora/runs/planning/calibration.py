"""Measures how many tokens a second this machine trains, with random weights of the model's shape.

No weight is read. Of a large model a few layers are made; the others count by their parameters, to
which the products of a pass are proportional.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedlora.data.tokenize import Tokens
from fedlora.lowrank import LowRank
from fedlora.model.acceleration import accelerate
from fedlora.model.base import BaseModel
from fedlora.model.batches import count_labelled
from fedlora.model.lora_layer import ClientAdapter
from fedlora.model.passes import runner_of
from fedlora.runs.planning.random_model import (
    LARGEST,
    inner_parameters,
    layers_to_make,
    random_model,
)


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
    base: BaseModel,
    batch: Sequence[Tokens],
    rank: int,
    device: torch.device,
    seconds: float = 10,
    *,
    gradient_checkpointing: bool = False,
) -> Speed:
    """Train on one batch over and over, for some seconds.

    Args:
        base: on the meta device, not quantised.
        batch: tokenised rows of a micro-batch.
        rank: of the adapter.
        device: to measure.
        seconds: at least one pass is measured, however long it takes.
        gradient_checkpointing: recompute activations.

    Raises:
        InputError: even one layer is too large to be made for this.
    """
    made = random_model(base, device, layers=layers_to_make(base, LARGEST))
    accelerate(made.model, gradient_checkpointing=gradient_checkpointing)
    share = inner_parameters(made.model) / inner_parameters(base.model)
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
