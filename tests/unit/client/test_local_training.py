"""A client's batches, schedule and number of steps are those of transformers' Trainer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedlora.client.local_training import LocalTraining, batches, schedule
from fedlora.data.tokenize import Tokens
from support.train import (
    KINDS,
    rates_of_transformers,
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("warmup", "in_steps"), [(0, 0), (3, 3), (0.25, 5)])
def test_schedules_are_those_of_transformers(kind: str, warmup: float, in_steps: int) -> None:
    rate, steps = 2e-4, 20
    training = LocalTraining(lr_scheduler_type=kind, warmup_steps=warmup, learning_rate=rate)
    factor = schedule(training, steps)
    wanted = rates_of_transformers(kind, in_steps, steps, rate)
    assert [rate * factor(i) for i in range(steps)] == pytest.approx(wanted, rel=1e-9, abs=1e-15)


def test_batches_are_shuffled_epochs_cut_as_trainer_cuts_them() -> None:
    data: list[Tokens] = [{"input_ids": [i], "labels": [i]} for i in range(11)]
    training = LocalTraining(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    found = [
        [[row["input_ids"][0] for row in part] for part in micro]
        for micro in batches(data, training, 5)
    ]
    # Six batches, the last of one row; steps of four and of two of them; then the next epoch.
    assert [[len(part) for part in micro] for micro in found] == [
        [2, 2, 2, 2],
        [2, 1],
        [2, 2, 2, 2],
        [2, 1],
        [2, 2, 2, 2],
    ]
    flat = [[i for part in micro for i in part] for micro in found]
    assert sorted(flat[0] + flat[1]) == sorted(flat[2] + flat[3]) == list(range(11))
    assert flat[0] + flat[1] != flat[2] + flat[3]
    for other in ({"seed": 1}, {"round": 2}, {"client": 1}):
        assert list(batches(data, replace(training, **other), 1)) != list(
            batches(data, training, 1)
        )
    assert list(batches(data, replace(training, learning_rate=1.0), 5)) == list(
        batches(data, training, 5)
    )


@pytest.mark.parametrize(
    ("number", "values", "steps"),
    [
        (22, {}, 3),
        (22, {"num_train_epochs": 2.5}, 8),
        (22, {"num_train_epochs": 0.1}, 1),
        (22, {"gradient_accumulation_steps": 2}, 2),
        (22, {"max_steps": 50}, 50),
        (1, {"max_steps": 2, "num_train_epochs": 9}, 2),
        (1, {}, 1),
    ],
)
def test_the_number_of_steps(number: int, values: dict[str, Any], steps: int) -> None:
    assert LocalTraining(per_device_train_batch_size=8, **values).steps(number) == steps
