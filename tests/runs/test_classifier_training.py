"""Training a classifier takes the steps of transformers' Trainer, head and adapter together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import (
    LoraConfig,
    get_peft_model,
)
from torch import Tensor

from fedlora.client.local_training import LocalTraining
from fedlora.lowrank import unfold
from fedlora.model.base import BaseModel
from fedlora.runs.session import Session
from support.by_trainer import (
    adapter_of,
    by_trainer,
)
from support.classifier import (
    bert,  # noqa: F401
    data,  # noqa: F401
    llama,  # noqa: F401
    session_of,
)
from support.train import (
    RANK,
    SCALE,
    losses_of,
    same,
    start_of,
)


def peft_classifier(path: Path, session: Session) -> Any:
    """The untouched base with PEFT's layers, beginning at `start_of` and our head."""
    base = session.base
    torch.manual_seed(0)
    model = get_peft_model(
        hf.AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=3, dtype=torch.float32, pad_token_id=0
        ),
        LoraConfig(
            r=RANK,
            lora_alpha=SCALE * RANK,
            target_modules=list(base.targets.shapes),
            modules_to_save=list(base.targets.modules_to_save),
            task_type="SEQ_CLS",
        ),
    )
    for name, x in start_of(base).items():
        a, b = unfold(x, SCALE)
        layer = model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data = a
        layer.lora_B["default"].weight.data = b
    for name, parameter in heads_of(model).items():
        parameter.data = base.read_full_params()[name]
    return model


def heads_of(model: Any) -> dict[str, Tensor]:
    """The parameters PEFT trains whole, by their names in the plain model."""
    mark = ".modules_to_save.default"
    return {
        name.replace(mark, "").removeprefix("base_model.model."): parameter
        for name, parameter in model.named_parameters()
        if mark in name
    }


CLIPPED = LocalTraining(
    client=2,
    round=3,
    per_device_train_batch_size=4,
    learning_rate=3e-2,
    warmup_steps=2,
    weight_decay=0.1,
    adam_epsilon=1e-2,  # of the size of gradients, or Adam would undo the clipping
    max_grad_norm=0.3,
    num_train_epochs=3,
)


TRAININGS = {
    "clipping, warm-up, decay, a partial batch": CLIPPED,
    "no clipping, other moments": LocalTraining(
        per_device_train_batch_size=5,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        adam_beta1=0.8,
        adam_beta2=0.95,
        max_grad_norm=0.0,
        num_train_epochs=2.5,
    ),
}


def compare(path: Path, session: Session, training: LocalTraining, where: Path) -> list[float]:
    """Train both ways; losses, adapters and heads are the same."""
    base, data = session.base, session.data.clients[0].train
    assert len({len(row["input_ids"]) for row in data}) > 2  # there is padding
    model, start = peft_classifier(path, session), base.read_full_params()
    assert heads_of(model).keys() == start.keys()
    losses, _ = by_trainer(model, data, training, where)
    ours = losses_of(base, data, training)
    assert len(ours) == len(losses) == training.steps(len(data)) > 3
    assert max(losses) - min(losses) > 0.05
    assert ours == pytest.approx(losses, rel=3e-5)
    same(base.read_adapter(), adapter_of(model, base), 5e-3)
    trained = base.read_full_params()
    for name, theirs in heads_of(model).items():
        limit = 5e-3 * float(theirs.abs().max())
        torch.testing.assert_close(trained[name], theirs.detach(), rtol=0, atol=limit)
        assert float((trained[name] - start[name]).abs().max()) > 10 * limit
    return ours


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS.keys())
def test_training_a_classifier_is_that_of_transformers(
    bert: Path, data: Path, training: LocalTraining, tmp_path: Path
) -> None:
    compare(bert, session_of(bert, data, tmp_path), training, tmp_path)


def test_training_a_causal_classifier_is_that_of_transformers(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    """It reads the last token that is no padding."""
    compare(llama, session_of(llama, data, tmp_path), CLIPPED, tmp_path)


def test_an_accumulated_step_is_that_of_the_whole_batch(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    """Where Trainer, whose classifiers are not told the rows of a step, adds means of batches."""
    session = session_of(bert, data, tmp_path)
    rows_of = session.data.clients[0].train[:8]
    at_once = replace(CLIPPED, per_device_train_batch_size=8, num_train_epochs=4)
    start = session.base.read_full_params()
    whole = losses_of(session.base, rows_of, at_once)
    session.base.load([], None, full_params=start)
    parts = replace(at_once, per_device_train_batch_size=3, gradient_accumulation_steps=3)
    assert losses_of(session.base, rows_of, parts) == pytest.approx(whole, rel=1e-5)


def gradients(base: BaseModel, data: Any) -> tuple[float, float]:
    """The norms of the adapter's and of the head's gradient in the first step of `CLIPPED`."""
    from fedlora.client.local_training import batches
    from fedlora.model.batches import collate
    from fedlora.model.loss import summed_loss

    base.load([], start_of(base), SCALE)
    micro = next(iter(batches(data, CLIPPED, 1)))
    base.model.train()
    (summed_loss(base.model, collate(micro[0]))[0] / len(micro[0])).backward()
    heads = {id(p) for p in base.full_params.values()}
    trained = [p for p in base.model.parameters() if p.requires_grad]
    sums = [0.0, 0.0]
    for p in trained:
        sums[id(p) in heads] += float(p.grad.square().sum())
        p.grad = None
    return sums[0] ** 0.5, sums[1] ** 0.5


def test_gradients_are_clipped_over_adapter_and_head_together(
    bert: Path, data: Path, tmp_path: Path
) -> None:
    """One plain step with the limit between the parts and the whole: only the sum exceeds it."""
    session = session_of(bert, data, tmp_path)
    base, part = session.base, session.data.clients[0].train
    adapter, head = gradients(base, part)
    together = (adapter**2 + head**2) ** 0.5
    limit = (max(adapter, head) + together) / 2
    assert max(adapter, head) < limit < 0.999 * together
    # With a huge epsilon and no moments AdamW's step is `-lr / eps * gradient`.
    eps = 1e4
    training = replace(
        CLIPPED,
        adam_beta1=0.0,
        adam_beta2=0.0,
        adam_epsilon=eps,
        learning_rate=eps,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_steps=1,
    )
    start = base.read_full_params()

    def moved(max_grad_norm: float) -> dict[str, Tensor]:
        base.load([], None, full_params=start)
        losses_of(base, part, replace(training, max_grad_norm=max_grad_norm))
        return {name: x - start[name] for name, x in base.read_full_params().items()}

    free, clipped = moved(0.0), moved(limit)
    for name, x in free.items():
        torch.testing.assert_close(clipped[name], x * (limit / together), rtol=1e-3, atol=1e-6)
    size = sum(float(x.square().sum()) for x in free.values()) ** 0.5
    assert size == pytest.approx(head, rel=1e-2)


def test_clipping_is_active_in_the_comparison(bert: Path, data: Path, tmp_path: Path) -> None:
    session = session_of(bert, data, tmp_path)
    part, start = session.data.clients[0].train, session.base.read_full_params()
    clipped = losses_of(session.base, part, CLIPPED)
    session.base.load([], None, full_params=start)
    free = losses_of(session.base, part, replace(CLIPPED, max_grad_norm=0.0))
    assert free != pytest.approx(clipped, rel=1e-3)
