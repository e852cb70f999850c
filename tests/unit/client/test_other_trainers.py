"""How a client trains, in the words of transformers' trainers.

That they train is in tests/runs/test_other_trainers.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from fedlora.client.local_training import LocalTraining
from fedlora.client.other_trainers import run_trainer, trainer_arguments
from fedlora.errors import InputError
from fedlora.model.client_rows import ClientRows
from fedlora.model.lora_layer import AdapterLayer


class Model(nn.Linear):
    """A model on a device."""

    device = torch.device("cpu")


def test_settings_of_the_same_name_are_handed_on() -> None:
    training = LocalTraining(learning_rate=0.25, max_steps=7, adam_beta2=0.5, warmup_steps=3)
    arguments = TrainingArguments(**trainer_arguments(Model(1, 1), training))
    assert (arguments.learning_rate, arguments.max_steps) == (0.25, 7)
    assert (arguments.adam_beta2, arguments.warmup_steps) == (0.5, 3)
    assert (arguments.use_cpu, arguments.bf16, arguments.report_to) == (True, False, [])


def test_every_client_and_round_draws_another_order() -> None:
    trainings = [LocalTraining(client=k, round=t) for k in range(3) for t in range(1, 4)]
    seeds = [trainer_arguments(Model(1, 1), training)["seed"] for training in trainings]
    assert len(set(seeds)) == 9


def test_checkpointing_is_the_models() -> None:
    model = Model(1, 1)
    off = TrainingArguments(**trainer_arguments(model, LocalTraining()))
    assert (off.gradient_checkpointing, off.gradient_checkpointing_kwargs) == (False, None)
    model.gradient_checkpointing = True  # type: ignore[assignment]
    on = TrainingArguments(**trainer_arguments(model, LocalTraining()))
    assert on.gradient_checkpointing
    assert on.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_a_loss_that_is_not_finite_is_told_as_it_is() -> None:
    arguments = TrainingArguments(**trainer_arguments(Model(1, 1), LocalTraining()))
    assert not arguments.logging_nan_inf_filter


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"lr_scheduler_scope": "federation"}, "lr_scheduler_scope: federation: a trainer of"),
        ({"proximal_mu": 0.1}, "proximal_mu: 0.1: trainers of transformers and TRL have no such"),
        ({"tail_penalty": 0.5}, "tail_penalty: 0.5: trainers of"),
    ],
)
def test_settings_that_they_do_not_have(more: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        trainer_arguments(Model(1, 1), LocalTraining(**more))


def test_an_adapter_that_trl_would_not_train() -> None:
    layer = AdapterLayer(nn.Linear(2, 2), ClientRows(), 0)
    kind = type("SomeTrainer", (), {"__module__": "trl.trainer"})
    trainer = kind()
    trainer.model = SimpleNamespace(get_output_embeddings=lambda: layer)
    with pytest.raises(InputError, match="lora_target_modules: TRL's trainers read the weight"):
        run_trainer(trainer, LocalTraining())
