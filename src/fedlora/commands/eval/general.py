"""Measures forgetting: how much worse a tuned model predicts general text than its base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedlora.data.tokenize import Tokens


@dataclass(frozen=True)
class Losses:
    """Of every window: the summed cross-entropy in nats, and the tokens predicted."""

    sums: Sequence[float]
    counts: Sequence[int]

    @property
    def loss(self) -> float:
        """Mean over all tokens, in nats."""
        return sum(self.sums) / sum(self.counts)

    @property
    def scores(self) -> dict[str, Any]:
        """Loss and perplexity `exp(loss)`."""
        return {
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "tokens": sum(self.counts),
            "windows": len(self.counts),
        }


def measured(model: Any, rows: Sequence[Tokens], batch_size: int) -> Losses:
    """A model's losses on `windows`."""
    from fedlora.commands.eval.likelihood import cross_entropy, per_row

    losses = per_row(model, rows, batch_size, cross_entropy)
    return Losses([float(x.to(torch.float64).sum()) for x in losses], [len(x) for x in losses])


def forgetting(tuned: Losses, base: Losses) -> dict[str, float | None]:
    """How much more a tuned model's tokens cost on general text, in nats per token.

        f = sum_i D_i / sum_i n_i,  D_i = tuned_i - base_i

    over windows i of n_i tokens. The 95% interval is Student's, with the variance of a ratio's
    linearisation, `sum_i (D_i - f n_i)^2 k / (k - 1) / (sum_i n_i)^2` over k windows: both models
    see the same text, so what makes a window hard for both does not widen it.

    Returns:
        forgetting, and forgetting_low and forgetting_high (None with one window).
    """
    from scipy.stats import t

    total, k = sum(base.counts), len(base.counts)
    each = [x - y for x, y in zip(tuned.sums, base.sums, strict=True)]
    value = sum(each) / total
    if k < 2:
        return {"forgetting": value, "forgetting_low": None, "forgetting_high": None}
    residuals = [d - value * n for d, n in zip(each, base.counts, strict=True)]
    error = math.sqrt(sum(r * r for r in residuals) * k / (k - 1)) / total
    half = float(t.ppf(0.975, k - 1)) * error
    return {"forgetting": value, "forgetting_low": value - half, "forgetting_high": value + half}
