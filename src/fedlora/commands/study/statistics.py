"""Computes means, spreads and paired 95% intervals across seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation (None for a single value)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1))


@dataclass(frozen=True)
class Difference:
    """A paired difference, mean over seeds of `a_seed - b_seed`.

    Args:
        mean: of the differences.
        low, high: ends of the interval `mean -+ t s / sqrt(n)`, with s the standard deviation of
            the n differences and t the 97.5% point of Student's t with n - 1 degrees of freedom;
            None with fewer than two seeds.
        seeds: how many seeds both have.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int

    def verdict(self, greater_is_better: bool = True) -> str:
        """`wins` or `loses` where the interval excludes 0, else `ties`; `-` without an interval."""
        if self.low is None or self.high is None:
            return "-"
        if self.low <= 0 <= self.high:
            return "ties"
        return "wins" if (self.mean > 0) == greater_is_better else "loses"


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Difference | None:
    """The difference of a to b over the seeds that both have; None where they share none.

    Args:
        a, b: seed -> value.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    differences = [a[seed] - b[seed] for seed in seeds]
    mean, sd = mean_and_sd(differences)
    if sd is None:
        return Difference(mean, None, None, 1)
    from scipy.stats import t

    half = float(t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1)) * sd / math.sqrt(len(seeds))
    return Difference(mean, mean - half, mean + half, len(seeds))
