"""Makes tensors of tokenised rows, and the cross-entropy of their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.tokens import IGNORE, Tokens


def labelled(rows: Sequence[Tokens]) -> int:
    """What a loss is a mean over: labelled tokens (never a row's first), or a classifier's rows."""
    if rows and "label" in rows[0]:
        return len(rows)
    return sum(label != IGNORE for row in rows for label in row["labels"][1:])


def collate(
    rows: Sequence[Tokens], device: torch.device | str = "cpu", pad_token_id: int = 0
) -> dict[str, Tensor]:
    """Rows as right-padded tensors `(batch, longest)`: input_ids, attention_mask, labels.

    A classifier's labels are `(batch,)`; `token_type_ids` go along where rows have them.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filling: int) -> Tensor:
        out = torch.full((len(rows), longest), filling, dtype=torch.long)
        for i, row in enumerate(rows):
            out[i, : len(row[key])] = torch.tensor(row[key])
        return out.to(device)

    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        mask[i, : len(row["input_ids"])] = 1
    batch = {"input_ids": padded("input_ids", pad_token_id), "attention_mask": mask.to(device)}
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = padded("token_type_ids", 0)
    if "label" in rows[0]:
        batch["labels"] = torch.tensor([row["label"] for row in rows], device=device)
    else:
        batch["labels"] = padded("labels", IGNORE)
    return batch


def flat(rows: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """All token ids `(tokens,)`, where a labelled token is predicted `(n,)`, and its label."""
    ids = [token for row in rows for token in row["input_ids"]]
    following = [label for row in rows for label in (*row["labels"][1:], IGNORE)]
    labels = torch.tensor(following)
    places = (labels != IGNORE).nonzero()[:, 0]
    return torch.tensor(ids).to(device), places.to(device), labels[places].to(device)


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
    """`w_i (logsumexp(z_i) - z_i[label_i])`; the gradient `w_i (softmax(z_i) - 1[label_i])` takes
    the place of the logits, which nothing else reads.
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
        # Only ever of a sum: what comes in is ones.
        gradient, ctx.gradient = ctx.gradient, None
        return gradient, None, None
