"""A client's learning rate over its steps, as it trains."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fedlora.client.local_training import LocalTraining
from fedlora.model.base import BaseModel
from support.train import (
    KINDS,
    dataset_of,
    llama,  # noqa: F401
    losses_of,
    rates_of_transformers,
    record_rates,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_restarts_each_round_or_spans_the_federation(
    kind: str, llama: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = record_rates(monkeypatch)
    training = LocalTraining(
        num_rounds=2,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        lr_scheduler_type=kind,
        warmup_steps=0.25,
        max_steps=4,
    )
    data = dataset_of(llama, 2)
    for scope in ("round", "federation"):
        for number in (1, 2):
            losses_of(llama, data, replace(training, round=number, lr_scheduler_scope=scope))
    once = rates_of_transformers(kind, 1, 4, 1e-3)
    whole = rates_of_transformers(kind, 2, 8, 1e-3)
    assert rates == pytest.approx([*once * 2, *whole], rel=1e-9, abs=1e-15)
