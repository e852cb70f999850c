"""Computes the cross-entropy of labels, in chunks where the logits are large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.data.tokenize import IGNORE


def summed_loss(
    model: Any, batch: Mapping[str, Tensor], auxiliary: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed cross-entropy, in float32, of the labelled tokens or of a classifier's rows.

    With `auxiliary` it is `n (CE + auxiliary aux_loss)`, CE the mean over the n labelled tokens.

    Returns:
        The sum (a scalar), the logits `(n, vocabulary)` of the n labelled tokens or `(n, classes)`
        of the n rows, their labels `(n,)`.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels, extra = batch["labels"], 0.0
    if labels.ndim == 1:
        logits = model(**inputs).logits.float()  # (batch, classes)
    else:
        out = model(**inputs, use_cache=False)
        counted = labels[:, 1:] != IGNORE  # (batch, longest - 1)
        logits = out.logits[:, :-1][counted].float()  # (tokens, vocabulary)
        labels = labels[:, 1:][counted]
        if auxiliary:
            extra = len(labels) * auxiliary * out.aux_loss
    return F.cross_entropy(logits, labels, reduction="sum") + extra, logits, labels


class CrossEntropy(torch.autograd.Function):
    """The weighted cross-entropy `w_i (logsumexp(z_i) - z_i[label_i])` of logits z, row by row.

    To save memory the gradient `w_i (softmax(z_i) - 1[label_i])` is written over the logits, which
    nothing else may read. The backward pass is right for the sum of the losses only.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        at, w = labels[:, None], weights[:, None]
        picked, largest = logits.gather(1, at), logits.amax(1, keepdim=True)
        total = logits.sub_(largest).exp_().sum(1, keepdim=True)
        ctx.gradient = logits.mul_(w / total).scatter_add_(1, at, -w)
        return ((total.log() + largest - picked) * w)[:, 0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # The losses are summed, so the gradient that comes in is 1 for each.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient, None, None
