"""What sites have measured, as if their rows lay together."""

from __future__ import annotations

import math

import pytest

from fedlora.federation.handshake import Evaluated
from fedlora.runs.site_evaluation import mean_by_rows


def test_losses_are_weighted_by_tokens_and_matches_by_rows() -> None:
    out = mean_by_rows(
        {
            1: Evaluated(1, 300, {"loss": 2.0, "perplexity": math.exp(2), "exact_match": 1.0}),
            0: Evaluated(3, 100, {"loss": 1.0, "perplexity": math.e, "exact_match": 0.0}),
        }
    )
    assert out == {
        "loss": pytest.approx(1.75),
        "perplexity": pytest.approx(math.exp(1.75)),
        "exact_match": pytest.approx(0.25),
    }


def test_a_classifier_has_no_mean_of_its_labels() -> None:
    per_class = {"no": {"f1": 1.0}}
    out = mean_by_rows(
        {k: Evaluated(2, 2, {"accuracy": k, "per_class": per_class}) for k in (0, 1)}
    )
    assert out == {"accuracy": 0.5}


def test_what_nobody_has_measured_is_left_out() -> None:
    assert mean_by_rows({}) == {}
    assert mean_by_rows({0: Evaluated(0, 0, {})}) == {}
    some = {0: Evaluated(1, 1, {"loss": None}), 1: Evaluated(1, 1, {"loss": 3.0})}
    assert mean_by_rows(some) == {"loss": 3.0}
    assert mean_by_rows({0: some[0]}) == {}
