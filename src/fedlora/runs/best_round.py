"""Keeps the round with the best evaluation so far, for early stopping and the final model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Args:
        round: when it was measured; None before there was one.
        value: of the metric that decides (`metric_for_best_model`).
        evaluations_since: how many came after it and were no better.
    """

    round: int | None = None
    value: float | None = None
    evaluations_since: int = 0

    def after(self, number: int, value: float, *, greater: bool) -> Best:
        """The best evaluation once round `number` has reached `value`; NaN is never better."""
        sign = 1.0 if greater else -1.0
        better = self.value is None or sign * value > sign * self.value
        if math.isfinite(value) and better:
            return Best(number, value)
        return replace(self, evaluations_since=self.evaluations_since + 1)
