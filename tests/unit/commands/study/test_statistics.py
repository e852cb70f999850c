"""Means, spreads and paired intervals, against scipy's."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedlora.commands.study.statistics import Difference, mean_and_sd, paired


def test_the_spread_is_that_of_a_sample() -> None:
    values = [1.0, 2.0, 4.0]
    assert mean_and_sd(values) == (
        pytest.approx(statistics.mean(values)),
        pytest.approx(statistics.stdev(values)),
    )
    assert mean_and_sd([3.0]) == (3.0, None)


def test_the_interval_is_that_of_students_t_over_common_seeds() -> None:
    a, b = {0: 0.5, 1: 0.7, 2: 0.9, 7: 9.0}, {2: 0.6, 1: 0.5, 0: 0.45, 8: -9.0}
    made = paired(a, b)
    assert made is not None
    seeds = (0, 1, 2)
    expected = stats.ttest_rel([a[s] for s in seeds], [b[s] for s in seeds])
    interval = expected.confidence_interval(0.95)
    assert made.seeds == 3
    assert (made.low, made.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert made.mean == pytest.approx((interval.low + interval.high) / 2)


def test_one_seed_has_no_interval_and_none_no_difference() -> None:
    assert paired({0: 2.0}, {0: 1.0}) == Difference(1.0, None, None, 1)
    assert paired({0: 2.0}, {1: 1.0}) is None


@pytest.mark.parametrize(
    ("low", "high", "greater_is_better", "verdict"),
    [
        (0.1, 0.3, True, "wins"),
        (0.1, 0.3, False, "loses"),
        (-0.3, -0.1, True, "loses"),
        (-0.3, -0.1, False, "wins"),
        (-0.1, 0.3, True, "ties"),
        (0.0, 0.3, True, "ties"),
        (None, None, True, "-"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(
    low: float | None, high: float | None, greater_is_better: bool, verdict: str
) -> None:
    mean = 0.0 if low is None or high is None else (low + high) / 2
    assert Difference(mean, low, high, 3).verdict(greater_is_better) == verdict


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=2, max_size=8, unique=True
    )
)
def test_the_interval_is_that_of_scipys_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    a, b = dict(enumerate(x for x, _ in pairs)), dict(enumerate(y for _, y in pairs))
    found = paired(a, b)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    differences = np.array([x - y for x, y in pairs])
    if np.ptp(differences) < 1e-6:
        return
    oracle = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    assert np.allclose([found.low, found.high], [oracle.low, oracle.high], rtol=1e-6, atol=1e-9)


def test_a_win_is_an_interval_without_zero() -> None:
    clear = paired({0: 0.9, 1: 0.91, 2: 0.92}, {0: 0.5, 1: 0.52, 2: 0.51})
    unclear = paired({0: 0.9, 1: 0.1, 2: 0.5}, {0: 0.5, 1: 0.4, 2: 0.4})
    single = paired({0: 0.9}, {0: 0.1})
    assert clear is not None
    assert unclear is not None
    assert single is not None
    assert (clear.verdict(), clear.verdict(greater_is_better=False)) == ("wins", "loses")
    assert unclear.verdict() == "ties"
    assert (single.low, single.verdict()) == (None, "-")
