"""Computes the log-likelihood of every labelled token, row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.model.passes import runner_of

Measure = Callable[[Tensor, Tensor], Tensor]
"""Logits `(n, vocabulary)` and labels `(n,)` of n labelled tokens -> `(n, ...)`."""


def per_row(
    model: Any,
    rows: Sequence[Tokens],
    batch_size: int,
    measure: Measure,
) -> list[Tensor]:
    """What `measure` gives for the labelled tokens of every row, on the CPU.

    Args:
        model: of transformers; dropout is turned off.
        rows: tokenised, with at least one label each that is not the first.
        batch_size: rows at once.
        measure: of some labelled tokens.
    """
    model.eval()
    passes = runner_of(model)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    out: dict[int, Tensor] = {}
    with torch.inference_mode():
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            chunks = [
                measure(logits, labels).cpu()
                for logits, labels in passes.logits_and_labels(model, [rows[i] for i in part])
            ]
            counts = [sum(x != IGNORE for x in rows[i]["labels"][1:]) for i in part]
            out |= dict(zip(part, torch.cat(chunks).split(counts), strict=True))
    return [out[i] for i in range(len(rows))]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`-log p(label)` of each token, in nats: `(n,)`."""
    return F.cross_entropy(logits, labels, reduction="none")
