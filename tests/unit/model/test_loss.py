"""The cross-entropy of labels, against PyTorch's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.model.loss import CrossEntropy, summed_loss


def giving(logits: Tensor, aux_loss: Tensor | None = None) -> Any:
    return lambda **inputs: SimpleNamespace(logits=logits, aux_loss=aux_loss)


def test_the_sum_over_labelled_tokens_shifted_by_one() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7)
    labels = torch.tensor([[3, -100, 5, 6], [1, 2, -100, -100]])
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "labels": labels}
    loss, scored, kept = summed_loss(giving(logits), batch)
    expected = F.cross_entropy(
        logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), reduction="sum"
    )
    torch.testing.assert_close(loss, expected)
    assert kept.tolist() == [5, 6, 2]
    assert torch.equal(scored, torch.stack([logits[0, 1], logits[0, 2], logits[1, 0]]))


def test_the_auxiliary_loss_is_weighted_like_the_tokens() -> None:
    logits = torch.zeros(1, 3, 5)
    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.long), "labels": torch.tensor([[0, 1, 2]])}
    plain = summed_loss(giving(logits), batch)[0]
    loss = summed_loss(giving(logits, torch.tensor(3.0)), batch, auxiliary=0.5)[0]
    torch.testing.assert_close(loss, plain + 2 * 0.5 * 3.0)


def test_a_classifier_has_one_label_a_row() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4), torch.tensor([0, 3, 1])
    loss, scored, kept = summed_loss(giving(logits), {"labels": labels})
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, reduction="sum"))
    assert torch.equal(scored, logits)
    assert torch.equal(kept, labels)


def test_half_precision_logits_are_summed_in_float32() -> None:
    batch = {"labels": torch.tensor([0])}
    loss = summed_loss(giving(torch.zeros(1, 2, dtype=torch.bfloat16)), batch)[0]
    assert loss.dtype == torch.float32


def test_the_memory_saving_loss_has_the_values_and_gradients_of_pytorchs() -> None:
    torch.manual_seed(0)
    weights, labels = torch.rand(6, dtype=torch.float64), torch.randint(0, 9, (6,))
    inputs = torch.randn(6, 9, dtype=torch.float64) * 30  # far apart: exp alone would overflow
    ours, theirs = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    loss = CrossEntropy.apply(ours * 1, labels, weights)
    expected = F.cross_entropy(theirs, labels, reduction="none") * weights
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
