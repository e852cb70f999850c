"""One client's steps: clipping, FedProx, the loss scale of float16, and its figures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from fedlora.client.local_run import FLOAT16_SCALE, LocalRun, TrainingJob
from fedlora.client.local_training import LocalTraining


def row(length: int) -> dict[str, list[int]]:
    """A row of so many tokens, all of them learnt but the first."""
    return {"input_ids": list(range(length)), "labels": [-100, *range(1, length)]}


def local_run(rows: Any, scale: float | None = None, **keys: Any) -> tuple[LocalRun, nn.Parameter]:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    training = LocalTraining(per_device_train_batch_size=2, **keys)
    job = TrainingJob([("w", parameter)], rows, training)
    return LocalRun(job, lambda name: True, scale), parameter


def step(it: LocalRun, parameter: nn.Parameter, gradient: list[float], loss: float = 1.0) -> None:
    assert it.begin()
    it.loss = loss
    it.computed += 10
    assert parameter.grad is not None
    parameter.grad.copy_(torch.tensor(gradient))
    it.end()


def test_figures_of_all_steps() -> None:
    told: list[tuple[int, int, float, int]] = []
    it, parameter = local_run(
        [row(3), row(4), row(5)], on_step=lambda *seen: told.append(seen), num_train_epochs=1
    )
    step(it, parameter, [1.0, 0.0], loss=3.0)
    step(it, parameter, [1.0, 0.0], loss=1.0)
    assert not it.begin()
    metrics = it.metrics()
    assert (metrics["loss"], metrics["loss_first"], metrics["loss_last"]) == (2.0, 3.0, 1.0)
    assert (metrics["steps"], metrics["tokens"]) == (2, 12)
    assert metrics["padding"] == pytest.approx(1 - 12 / 20)
    assert [seen[:3] for seen in told] == [(1, 2, 3.0), (2, 2, 1.0)]


def test_gradients_are_clipped_after_the_proximal_term() -> None:
    """With no moments and a huge epsilon AdamW's step is `-lr / eps * gradient`."""
    plain = {"adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 1e6, "learning_rate": 1e6}
    it, parameter = local_run(
        [row(3)] * 4, proximal_mu=0.5, max_grad_norm=1.0, lr_scheduler_type="constant", **plain
    )
    step(it, parameter, [3.0, 4.0])  # at the start FedProx pulls nowhere
    torch.testing.assert_close(
        parameter.detach(), torch.tensor([1 - 0.6, 2 - 0.8]), rtol=1e-4, atol=0
    )
    step(it, parameter, [0.0, 0.0])  # 0.5 of the way back, which is shorter than 1
    wanted = torch.tensor([1 - 0.3, 2 - 0.4])
    torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-4, atol=0)


def test_the_loss_scale_is_a_power_of_two_and_falls_where_it_overflows() -> None:
    it, parameter = local_run([row(8)] * 2, scale=FLOAT16_SCALE)
    assert it.begin()
    assert it.labelled == 14
    assert it.loss_scale == FLOAT16_SCALE * 8
    assert parameter.grad is not None
    parameter.grad.copy_(torch.tensor([math.inf, 0.0]))
    assert it.overflows()
    assert it.loss_scale == FLOAT16_SCALE / 16 * 8
    assert not parameter.grad.any()
    parameter.grad.fill_(1.0)
    assert not it.overflows()


@pytest.mark.parametrize("rows", [[], [row(3)]])
def test_nothing_to_train_is_an_error(rows: Any) -> None:
    parameters = [] if rows else [("w", nn.Parameter(torch.ones(1)))]
    with pytest.raises(ValueError, match="at least one row and one parameter"):
        LocalRun(TrainingJob(parameters, rows, LocalTraining()), lambda name: False, None)
