"""Trains with transformers' Trainer, as a judge of our own local training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fedlora.client.local_training import LocalTraining
from fedlora.data.tokenize import Tokens
from fedlora.lowrank import LowRank
from fedlora.model.base import BaseModel
from fedlora.model.batches import collate
from fedlora.seeds import Purpose, generator
from support.train import SCALE


class Replay(torch.utils.data.Sampler[int]):
    """The order of rows in our epochs, one epoch each time it is asked."""

    def __init__(self, number: int, training: LocalTraining) -> None:
        self.number = number
        self.rng = generator(training.seed, training.round, training.client, Purpose.BATCHES)

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.permutation(self.number).tolist())


class Recorder(Trainer):
    """Trainer, replaying our order and noting the loss and the learning rate of every step."""

    def __init__(self, training: LocalTraining, **options: Any) -> None:
        super().__init__(**options)
        self.training = training
        self.micro: dict[int, list[float]] = {}
        self.rates: list[float] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return Replay(len(self.train_dataset), self.training)  # type: ignore[arg-type]

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
    model: Any, data: Sequence[Tokens], training: LocalTraining, where: Path
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
        training,
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
            **{name: getattr(training, name) for name in names},
        ),
    )
    trainer.train()
    return trainer.losses, trainer.rates
