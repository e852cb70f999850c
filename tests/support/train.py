"""Trains a small model by our loop and by transformers' Trainer over the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fedlora.client.trainer import Budget, train
from fedlora.data.tokenize import Tokens
from fedlora.lowrank import LowRank
from fedlora.model.base import BaseModel
from fedlora.model.batches import collate
from fedlora.seeds import Purpose, fresh_factors, generator

SCALE, RANK = 2.0, 4


def start_of(base: BaseModel) -> dict[str, LowRank]:
    """An adapter in mid-course: neither factor is zero."""
    fresh = fresh_factors(7, 0, 0, Purpose.CLIENT_INIT, base.targets.shapes)
    rng = torch.Generator().manual_seed(11)
    return {
        name: LowRank(fresh(name, RANK), 0.05 * torch.randn(m, RANK, generator=rng))
        for name, (m, _) in base.targets.shapes.items()
    }


def losses_of(base: BaseModel, data: Sequence[Tokens], budget: Budget) -> list[float]:
    """Train from `start_of` on; the loss of every step."""
    losses: list[float] = []
    base.load([], start_of(base), SCALE)
    train(
        base.model,
        data,
        replace(budget, on_step=lambda step, steps, loss, tokens: losses.append(loss)),
    )
    return losses


def same(ours: dict[str, LowRank], theirs: dict[str, LowRank], tolerance: float) -> None:
    """Both factors of every module are close, relative to the largest of the values."""
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        for a, b in ((ours[name].A, x.A), (ours[name].B, x.B)):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


class Replay(torch.utils.data.Sampler[int]):
    """The order of rows in our epochs, one epoch each time it is asked."""

    def __init__(self, number: int, budget: Budget) -> None:
        self.number = number
        self.rng = generator(budget.seed, budget.round, budget.client, Purpose.BATCHES)

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.permutation(self.number).tolist())


class Recorder(Trainer):
    """Trainer, replaying our order and noting the loss and the learning rate of every step."""

    def __init__(self, budget: Budget, **options: Any) -> None:
        super().__init__(**options)
        self.budget = budget
        self.micro: dict[int, list[float]] = {}
        self.rates: list[float] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return Replay(len(self.train_dataset), self.budget)  # type: ignore[arg-type]

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss = super().training_step(*arguments, **options)
        step = self.state.global_step
        if step not in self.micro:
            self.rates.append(self.optimizer.param_groups[0]["lr"])
        self.micro.setdefault(step, []).append(float(loss))
        return loss

    @property
    def losses(self) -> list[float]:
        """Of every step; Trainer has divided micro-batches by the tokens of the step already."""
        return [sum(values) for _, values in sorted(self.micro.items())]


def adapter_of(model: Any, base: BaseModel) -> dict[str, LowRank]:
    """What PEFT's layers hold, scale folded."""
    out = {}
    for name in base.targets.shapes:
        layer = model.get_submodule(f"base_model.model.{name}")
        out[name] = LowRank(
            layer.lora_A["default"].weight.detach(), SCALE * layer.lora_B["default"].weight.detach()
        )
    return out


def by_trainer(
    model: Any, data: Sequence[Tokens], budget: Budget, where: Path
) -> tuple[list[float], list[float]]:
    """Train with transformers; the losses and the learning rates of all steps."""
    names = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "num_train_epochs",
        "max_steps",
    )
    trainer = Recorder(
        budget,
        model=model,
        train_dataset=list(data),
        data_collator=collate,
        args=TrainingArguments(
            output_dir=str(where),
            optim="adamw_torch",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            **{name: getattr(budget, name) for name in names},
        ),
    )
    trainer.train()
    return trainer.losses, trainer.rates
