"""Local training takes the steps of transformers' Trainer with PEFT, and FedProx those by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedlora.client.local_training import LocalTraining, batches
from fedlora.data.tokenize import IGNORE
from fedlora.lowrank import unfold
from fedlora.model.base import BaseModel
from fedlora.model.batches import collate
from support.by_trainer import (
    adapter_of,
    by_trainer,
)
from support.models import load_base
from support.train import (
    RANK,
    SCALE,
    dataset_of,
    llama,  # noqa: F401
    losses_of,
    record_rates,
    same,
    start_of,
)


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def base_path(request: pytest.FixtureRequest) -> Path:
    """Both shapes of model: linear layers, and GPT-2's transposed ones."""
    path: Path = request.getfixturevalue(request.param)
    return path


def peft_model(base_path: Path, base: BaseModel) -> Any:
    """The untouched base with PEFT's layers, beginning at `start_of`."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32),
        LoraConfig(
            r=RANK,
            lora_alpha=SCALE * RANK,
            target_modules=list(base.targets.shapes),
            lora_dropout=0.0,
            fan_in_fan_out=base.targets.fan_in_fan_out,
            task_type="CAUSAL_LM",
        ),
    )
    for name, x in start_of(base).items():
        a, b = unfold(x, SCALE)
        layer = model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data = a
        layer.lora_B["default"].weight.data = b
    return model


TRAININGS = {
    # 22 rows in batches of 4: five whole, one of two; three micro-batches to a step: two steps.
    "accumulation, clipping, warm-up, decay, partial batches": LocalTraining(
        client=2,
        round=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        learning_rate=3e-2,
        lr_scheduler_type="linear",
        warmup_steps=2,
        weight_decay=0.1,
        adam_epsilon=1e-2,  # of the size of gradients, or Adam would undo the clipping
        max_grad_norm=0.25,
        num_train_epochs=3,
    ),
    "a share of warm-up, a last step of one micro-batch, half an epoch": LocalTraining(
        per_device_train_batch_size=3,
        gradient_accumulation_steps=7,  # eight micro-batches: steps of seven and of one
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=0.3,
        num_train_epochs=2.5,
    ),
    "steps beyond an epoch, other moments, no clipping": LocalTraining(
        client=1,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="polynomial",
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-4,
        weight_decay=0.3,
        max_grad_norm=0.0,
        num_train_epochs=1,
        max_steps=8,
    ),
    "a constant rate, fewer steps than an epoch": LocalTraining(
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        num_train_epochs=5,
        max_steps=4,
    ),
}


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS.keys())
def test_training_is_that_of_transformers(
    base_path: Path, training: LocalTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(str(base_path), target_modules="all-linear")
    data = dataset_of(base, 22)
    model = peft_model(base_path, base)
    losses, rates = by_trainer(model, data, training, tmp_path)
    our_rates = record_rates(monkeypatch)
    ours = losses_of(base, data, training)
    assert len(ours) == len(losses) == training.steps(len(data)) > 3
    assert max(losses) - min(losses) > 0.05  # it does move
    assert ours == pytest.approx(losses, rel=2e-5)
    assert our_rates == pytest.approx(rates, rel=1e-6, abs=1e-12)
    # Adam divides by the root of tiny second moments, which multiplies rounding.
    same(base.read_adapter(), adapter_of(model, base), 2e-3)


def test_loss_on_whole_texts_is_that_of_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    """Without a prompt the first token is labelled, and yet predicted from nothing."""
    base = load_base(str(tiny_llama), target_modules="all-linear")
    data = dataset_of(base, 10, completion_only=False)
    assert data[0]["labels"][0] != IGNORE
    training = LocalTraining(
        per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=4
    )
    losses, _ = by_trainer(peft_model(tiny_llama, base), data, training, tmp_path)
    assert losses_of(base, data, training) == pytest.approx(losses, rel=2e-5)


def test_clipping_is_active_in_the_comparison(llama: BaseModel) -> None:
    """The test above would not see clipping if gradients were below the limit anyway."""
    data = dataset_of(llama, 22)
    training = TRAININGS["accumulation, clipping, warm-up, decay, partial batches"]
    clipped = losses_of(llama, data, training)
    assert losses_of(llama, data, replace(training, max_grad_norm=0.0)) != pytest.approx(
        clipped, rel=1e-4
    )


def test_fedprox_is_a_term_of_the_loss(llama: BaseModel, tiny_llama: Path) -> None:
    """`mu/2 ||theta - theta_0||^2` in the graph, all parameters flattened, AdamW by its formula."""
    data = dataset_of(llama, 12)
    training = LocalTraining(
        client=3,
        round=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        weight_decay=0.05,
        max_grad_norm=0.5,
        max_steps=8,
        proximal_mu=3.0,
    )
    model = peft_model(tiny_llama, llama)
    parameters = [p for p in model.parameters() if p.requires_grad]
    theta_0 = [p.detach().clone() for p in parameters]
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    expected = []
    for step, micro in enumerate(batches(data, training, 8), 1):
        together = collate([row for part in micro for row in part])
        loss = model(**together).loss
        expected.append(float(loss.detach()))
        near = sum((p - p_0).square().sum() for p, p_0 in zip(parameters, theta_0, strict=True))
        grads = torch.autograd.grad(loss + training.proximal_mu / 2 * near, parameters)
        norm = torch.cat([g.flatten() for g in grads]).norm()
        factor = min(1.0, training.max_grad_norm / (float(norm) + 1e-6))
        with torch.no_grad():
            for p, g, m, v in zip(parameters, grads, first, second, strict=True):
                m.mul_(0.9).add_(0.1 * factor * g)
                v.mul_(0.999).add_(0.001 * (factor * g).square())
                p.mul_(1 - training.learning_rate * training.weight_decay)
                p.sub_(
                    training.learning_rate
                    * (m / (1 - 0.9**step))
                    / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
                )
    # The loss reported is the one on the data, without the term.
    assert losses_of(llama, data, training) == pytest.approx(expected, rel=1e-4)
    same(llama.read_adapter(), adapter_of(model, llama), 5e-3)
    assert losses_of(llama, data, replace(training, proximal_mu=0.0)) != pytest.approx(
        expected, rel=1e-3
    )
