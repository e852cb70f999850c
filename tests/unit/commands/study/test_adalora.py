"""AdaLoRA as a local training: what comes out is an adapter of a smaller rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.client.local_training import LocalTraining
from fedlora.commands.study.adalora import KEPT, train_adalora
from fedlora.errors import InputError
from fedlora.lowrank import LowRank
from fedlora.methods.shared import fresh_start
from fedlora.model.base import BaseModel, attach
from fedlora.model.targets import find_targets
from support.packing import SIZES, built, rows_of


def base(*whole: str) -> BaseModel:
    """A small Llama with a fresh adapter of rank 4."""
    model = built("llama", SIZES)
    it = attach(model, None, find_targets(model, ["q_proj"], "tiny", modules_to_save=whole))
    source = torch.Generator().manual_seed(0)

    def fresh(name: str, rank: int) -> torch.Tensor:
        return torch.randn(rank, it.targets.shapes[name][1], generator=source)

    it.load([], fresh_start(it.targets.shapes, 4, fresh), scale=2.0)
    return it


def training(**more: Any) -> LocalTraining:
    """Eight steps of two rows."""
    return LocalTraining(
        **{"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **more}
    )


def test_the_rank_is_divided_among_the_layers() -> None:
    it, told = base(), []
    rows = rows_of([6, 5, 7, 4])
    metrics = train_adalora(it.model, rows, training(on_step=lambda *step: told.append(step)))
    assert metrics["steps"] == len(told) == 8
    assert metrics["tokens"] == sum(tokens for *_, tokens in told) == 4 * 22
    assert metrics["mean_rank"] <= KEPT * 4
    adapter = it.read_adapter()
    directions = [int(x.B.any(0).sum()) for x in adapter.values()]
    assert sum(directions) / len(directions) <= KEPT * 4
    assert any(x.B.any() for x in adapter.values())


def test_what_it_cannot_train() -> None:
    it = base()
    with pytest.raises(InputError, match="3 steps a round are too few, take 4 or more"):
        train_adalora(it.model, rows_of([6]), training(max_steps=3))
    with pytest.raises(InputError, match="trains adapters alone, and this model has parameters"):
        train_adalora(base("lm_head").model, rows_of([6]), training())
    moved = {n: LowRank(x.A, x.B + 1) for n, x in it.read_adapter().items()}
    it.load([], moved)
    with pytest.raises(InputError, match="starts every round afresh; use it with method flora"):
        train_adalora(it.model, rows_of([6]), training())
