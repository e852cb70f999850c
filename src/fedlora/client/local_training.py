"""Says how a client trains in one round: its settings, its batches, its learning rates.

Batches and schedule depend on the settings' `(seed, round, client)` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedlora.data.tokenize import Tokens
from fedlora.seeds import Purpose, generator

StepCallback = Callable[[int, int, float, int], None]
"""Called after each step with `(step, steps, loss, tokens)`; tokens without padding."""


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in one round. Fields that `Config` has too mean the same as there.

    Args:
        client, round, seed: identify the random streams of batches and dropout.
        num_rounds: length of the federation, for a schedule that spans it.
        tail_penalty, tail_from: the rank penalty that the aggregation rule asks for, see
            `methods.values.Training`.
        max_length: tokens of a row, to which the rows are cut already.
        on_step: called after every step.
        tokenizer: the base's, for a training of your own; None in fedlora's.
    """

    client: int = 0
    round: int = 1
    seed: int = 42
    num_rounds: int = 1
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "linear"
    lr_scheduler_scope: str = "round"
    warmup_steps: float = 0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    num_train_epochs: float = 1.0
    max_steps: int = -1
    proximal_mu: float = 0.0
    tail_penalty: float = 0.0
    tail_from: float = 1.0
    max_length: int = 1024
    on_step: StepCallback | None = field(default=None, compare=False)
    tokenizer: Any = field(default=None, compare=False, repr=False)

    def steps(self, num_rows: int) -> int:
        """How many optimiser steps one round over `num_rows` rows has."""
        if self.max_steps > 0:
            return self.max_steps
        batches = math.ceil(num_rows / self.per_device_train_batch_size)
        per_epoch = math.ceil(batches / self.gradient_accumulation_steps)
        return math.ceil(self.num_train_epochs * per_epoch)


Budget = LocalTraining
"""The public name of earlier versions; in privacy, a budget is an epsilon."""

TrainFunction = Callable[[Any, Sequence[Tokens], LocalTraining], Mapping[str, Any]]
"""`(model, dataset, training) -> metrics`: trains, in place, the parameters that need gradients."""


def batches(
    dataset: Sequence[Tokens], training: LocalTraining, steps: int
) -> Iterator[list[list[Tokens]]]:
    """The micro-batches of each step, cut from shuffled epochs as transformers' Trainer cuts them.

    Args:
        dataset: the client's tokenised rows.
        training: gives the sizes and the random stream.
        steps: how many steps are wanted; epochs are repeated until there are so many.
    """
    size, accumulate = training.per_device_train_batch_size, training.gradient_accumulation_steps
    rng = generator(training.seed, training.round, training.client, Purpose.BATCHES)
    done = 0
    while done < steps:
        order = rng.permutation(len(dataset)).tolist()
        micro_batches = [
            [dataset[i] for i in order[begin : begin + size]]
            for begin in range(0, len(order), size)
        ]
        for begin in range(0, len(micro_batches), accumulate):
            if done == steps:
                return
            yield micro_batches[begin : begin + accumulate]
            done += 1


def schedule(training: LocalTraining, steps: int) -> Callable[[int], float]:
    """The factor on the learning rate, as a function of the step in this round (from 0).

    Args:
        training: names the schedule of transformers, its warm-up, and whether it spans all rounds.
        steps: of one round.
    """
    from transformers import get_scheduler

    spans_all_rounds = training.lr_scheduler_scope == "federation"
    total = steps * training.num_rounds if spans_all_rounds else steps
    offset = steps * (training.round - 1) if spans_all_rounds else 0
    warmup = training.warmup_steps
    warmup = math.ceil(total * warmup) if warmup < 1 else int(warmup)
    unused = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    scheduler = get_scheduler(
        training.lr_scheduler_type, unused, num_warmup_steps=warmup, num_training_steps=total
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: float(factor(offset + step))
