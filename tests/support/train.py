"""Trains a small model by our loop and by transformers' Trainer over the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from fedlora.client.local_training import LocalTraining
from fedlora.client.trainer import train
from fedlora.data.templates import TEMPLATES
from fedlora.data.tokenize import Tokens, tokenize
from fedlora.lowrank import LowRank
from fedlora.model.base import BaseModel
from fedlora.seeds import Purpose, fresh_factors
from support.models import load_base
from support.rows import rows

SCALE, RANK = 2.0, 4


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> BaseModel:
    """The tiny Llama with layers in place; a test loads the adapter it needs."""
    return load_base(str(tiny_llama), target_modules="all-linear")


def dataset_of(base: BaseModel, number: int, completion_only: bool = True) -> list[Tokens]:
    """Tokenised rows of different lengths."""
    values = rows(number)
    for i, row in enumerate(values):
        row["completion"] += "abc"[: i % 4]
    template = TEMPLATES["prompt_completion"]
    found = [tokenize(row, template, base.tokenizer, 64, completion_only) for row in values]
    return [row for row in found if row]


def record_rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rate at every AdamW step from here on."""
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def noting(self: Any, *arguments: Any, **options: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    return rates


def start_of(base: BaseModel) -> dict[str, LowRank]:
    """An adapter in mid-course: neither factor is zero."""
    fresh = fresh_factors(7, 0, 0, Purpose.CLIENT_INIT, base.targets.shapes)
    rng = torch.Generator().manual_seed(11)
    return {
        name: LowRank(fresh(name, RANK), 0.05 * torch.randn(m, RANK, generator=rng))
        for name, (m, _) in base.targets.shapes.items()
    }


def losses_of(base: BaseModel, data: Sequence[Tokens], training: LocalTraining) -> list[float]:
    """Train from `start_of` on; the loss of every step."""
    losses: list[float] = []
    base.load([], start_of(base), SCALE)
    train(
        base.model,
        data,
        replace(training, on_step=lambda step, steps, loss, tokens: losses.append(loss)),
    )
    return losses


def same(ours: dict[str, LowRank], theirs: dict[str, LowRank], tolerance: float) -> None:
    """Both factors of every module are close, relative to the largest of the values."""
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        for a, b in ((ours[name].A, x.A), (ours[name].B, x.B)):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def rates_of_transformers(kind: str, warmup: int, total: int, rate: float) -> list[float]:
    """As a loop with `scheduler.step()` after every step sees them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    out = []
    for _ in range(total):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


KINDS = ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"]
