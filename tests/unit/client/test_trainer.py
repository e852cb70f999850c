"""Local training: batches, schedules, the number of steps, padding, metrics, dropout's seeds.

The comparison with transformers' Trainer is in tests/runs/test_training_like_transformers.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.client.local_training import LocalTraining
from fedlora.client.trainer import train
from fedlora.data.tokenize import IGNORE
from fedlora.lowrank import LowRank
from fedlora.model.base import BaseModel
from fedlora.model.batches import collate, count_labelled
from fedlora.model.loss import summed_loss
from fedlora.model.passes import runner_of
from support.train import (
    SCALE,
    dataset_of,
    llama,  # noqa: F401
    start_of,
)


def equal(x: dict[str, LowRank], y: dict[str, LowRank]) -> bool:
    """To the bit."""
    return all(torch.equal(x[n].A, y[n].A) and torch.equal(x[n].B, y[n].B) for n in x)


def test_steps_beyond_an_epoch(llama: BaseModel) -> None:
    """Three rows, ten steps of two: every row is seen, epoch after epoch."""
    data = dataset_of(llama, 3)
    told: list[tuple[int, int, int]] = []
    training = LocalTraining(
        per_device_train_batch_size=2,
        max_steps=10,
        on_step=lambda step, steps, loss, tokens: told.append((step, steps, tokens)),
    )
    llama.load([], start_of(llama), SCALE)
    metrics = train(llama.model, data, training)
    lengths = sum(len(row["input_ids"]) for row in data)
    assert [(step, steps) for step, steps, _ in told] == [(i, 10) for i in range(1, 11)]
    assert [told[i][2] + told[i + 1][2] for i in range(0, 10, 2)] == [lengths] * 5
    assert metrics["steps"] == 10
    assert metrics["tokens"] == 5 * lengths


def test_padding_changes_no_loss(llama: BaseModel) -> None:
    """Rows of a batch are as if alone: padding is neither attended to nor learnt."""
    data = dataset_of(llama, 6)
    assert len({len(row["input_ids"]) for row in data}) > 2
    llama.load([], start_of(llama), SCALE)
    llama.model.eval()
    with torch.no_grad():
        together, logits, labels = summed_loss(llama.model, collate(data))
        alone = sum(float(summed_loss(llama.model, collate([row]))[0]) for row in data)
    assert float(together) == pytest.approx(alone, rel=1e-5)
    assert len(logits) == len(labels) == count_labelled(data)
    assert labels.tolist() == [t for row in data for t in row["labels"][1:] if t != IGNORE]


@pytest.mark.parametrize("packed", [True, False])
def test_metrics(llama: BaseModel, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not packed:  # as an architecture is run that needs padding
        monkeypatch.setattr(runner_of(llama.model), "packed", False)
        monkeypatch.setattr(runner_of(llama.model), "joint", False)
    data = dataset_of(llama, 8)
    losses: list[float] = []
    training = LocalTraining(
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        num_train_epochs=4,
        on_step=lambda step, steps, loss, tokens: losses.append(loss),
    )
    llama.load([], start_of(llama), SCALE)
    metrics = train(llama.model, data, training)
    lengths = [len(row["input_ids"]) for row in data]
    assert metrics["steps"] == len(losses) == 4
    assert metrics["loss"] == pytest.approx(sum(losses) / 4)
    assert (metrics["loss_first"], metrics["loss_last"]) == (losses[0], losses[-1])
    assert metrics["tokens"] == 4 * sum(lengths)
    share = 1 - sum(lengths) / (8 * max(lengths))
    assert share > 0.1
    assert metrics["padding"] == pytest.approx(0.0 if packed else share)
    assert not llama.model.training


def test_dropout_depends_on_seed_round_and_client_alone(llama: BaseModel) -> None:
    data = dataset_of(llama, 1)  # of one row, so that the order of batches plays no part
    training = LocalTraining(learning_rate=1e-2, max_steps=2)

    def trained(dropout: float = 0.5, **values: Any) -> dict[str, LowRank]:
        llama.load([], start_of(llama), SCALE, dropout)
        train(llama.model, data, replace(training, **values))
        return llama.read_adapter()

    torch.manual_seed(1)
    first = trained()
    torch.manual_seed(2)
    torch.rand(17)
    state = torch.get_rng_state()
    assert equal(trained(), first)
    assert torch.equal(torch.get_rng_state(), state)  # nor does it disturb anyone else's draws
    assert equal(trained(num_rounds=9), first)
    without = trained(dropout=0.0)
    assert not equal(without, first)
    for other in ({"seed": 1}, {"round": 2}, {"client": 1}):
        assert not equal(trained(**other), first)
        assert equal(trained(dropout=0.0, **other), without)


def test_nothing_to_train_is_an_error(llama: BaseModel) -> None:
    data = dataset_of(llama, 2)
    llama.load([])
    with pytest.raises(ValueError, match="at least one row and one parameter"):
        train(llama.model, data, LocalTraining())
    llama.load([], start_of(llama), SCALE)
    with pytest.raises(ValueError, match="at least one row and one parameter"):
        train(llama.model, [], LocalTraining())
