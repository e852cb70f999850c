"""Passes over several clients' rows, against the model's own pass of one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.model.passes import PackedRunner, runner_of
from support.packing import SIZES, built, rows_of

PARTS = [rows_of([6, 3], seed=1), [], rows_of([9], seed=2)]
WEIGHTS = [0.5, 1.0, 2.0]


def by_hand(model: Any, part: list[Tokens]) -> torch.Tensor:
    """The summed cross-entropy of each row by itself."""
    total = torch.zeros(())
    for row in part:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        total = total + F.cross_entropy(
            logits, torch.tensor(row["labels"][1:]), reduction="sum", ignore_index=IGNORE
        )
    return total


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Copies, after which there are none."""
    out = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out


@pytest.mark.parametrize("padded", [False, True])
def test_losses_and_gradients_are_those_of_single_rows(padded: bool) -> None:
    model = built("llama", SIZES)
    runner = PackedRunner(model)
    assert runner.packed
    if padded:
        runner.packed = False
    wanted = [by_hand(model, part) * w for part, w in zip(PARTS, WEIGHTS, strict=True)]
    sum(wanted).backward()  # type: ignore[union-attr]
    exact = gradients(model)
    result = runner.backward(model, PARTS, WEIGHTS)
    assert result.losses == pytest.approx([float(x.detach()) for x in wanted], rel=1e-5)
    for name, gradient in gradients(model).items():
        scale = float(exact[name].abs().max())
        torch.testing.assert_close(gradient, exact[name], rtol=1e-3, atol=1e-4 * scale)
    # Packed, there is no padding; padded, the first client's shorter row gets three tokens of it.
    assert result.computed == 18 + 3 * padded


def test_a_pass_longer_than_allowed_is_divided_and_changes_nothing() -> None:
    model = built("llama", SIZES)
    runner = PackedRunner(model)
    whole = runner.backward(model, PARTS, WEIGHTS)
    exact = gradients(model)
    runner.longest = 10
    parted = runner.backward(model, PARTS, WEIGHTS)
    assert parted.losses == pytest.approx(whole.losses, rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, exact[name], rtol=1e-3, atol=1e-4)


def test_logits_come_in_the_order_of_rows_with_their_labels() -> None:
    model = built("llama", SIZES)
    rows = [*PARTS[0], *PARTS[2]]
    with torch.no_grad():
        chunks = list(runner_of(model).logits_and_labels(model, rows))
        logits, labels = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        alone = [model(input_ids=torch.tensor([r["input_ids"]])).logits[0, :-1] for r in rows]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert labels.tolist() == [label for row in rows for label in row["labels"][1:]]


def test_a_classifiers_rows() -> None:
    model = built("llama", SIZES, classify=True)
    rows = rows_of([6, 3, 9], classify=True)
    runner = runner_of(model)
    assert runner.packed_forward.classifier
    result = runner.backward(model, [rows], [1.0])
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    labels = torch.tensor([row["label"] for row in rows])
    wanted = F.cross_entropy(torch.stack(alone), labels, reduction="sum")
    assert result.losses == [pytest.approx(float(wanted), rel=1e-4)]


def test_a_runner_is_made_once_and_leaves_the_model_as_it_was() -> None:
    model = built("llama", SIZES).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kind = model.config._attn_implementation
    assert runner_of(model) is runner_of(model)
    assert model.training
    assert model.config._attn_implementation == kind
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
