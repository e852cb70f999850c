"""Forgetting, against the formula of its interval."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from fedlora.commands.eval.general import Losses, forgetting, measured
from support.packing import SIZES, built, rows_of


def test_loss_and_perplexity_over_all_tokens() -> None:
    losses = Losses([6.0, 2.0], [3, 1])
    assert losses.loss == 2.0
    assert losses.scores == {
        "loss": 2.0,
        "perplexity": pytest.approx(math.e**2),
        "tokens": 4,
        "windows": 2,
    }
    assert math.isfinite(Losses([1e6], [1]).scores["perplexity"])


def test_the_interval_is_that_of_a_ratio() -> None:
    base, tuned = Losses([6.0, 2.0, 9.0], [3, 1, 4]), Losses([7.5, 2.0, 10.0], [3, 1, 4])
    scores = forgetting(tuned, base)
    differences, counts = torch.tensor([1.5, 0.0, 1.0]), torch.tensor([3.0, 1.0, 4.0])
    value = float(differences.sum() / counts.sum())
    residuals = differences - value * counts
    error = math.sqrt(float(residuals.square().sum()) * 3 / 2) / 8
    half = stats.t.ppf(0.975, 2) * error
    assert scores["forgetting"] == pytest.approx(value)
    assert scores["forgetting_low"] == pytest.approx(value - half, rel=1e-5)
    assert scores["forgetting_high"] == pytest.approx(value + half, rel=1e-5)


def test_one_window_has_no_interval_and_a_model_forgets_nothing_of_itself() -> None:
    assert forgetting(Losses([3.0], [2]), Losses([2.0], [2])) == {
        "forgetting": 0.5,
        "forgetting_low": None,
        "forgetting_high": None,
    }
    same = Losses([1.0, 2.0], [2, 3])
    assert set(forgetting(same, same).values()) == {0.0}


def test_every_windows_loss_is_that_of_its_tokens() -> None:
    model, rows = built("llama", SIZES), rows_of([6, 9])
    losses = measured(model, rows, 2)
    assert list(losses.counts) == [5, 8]
    for row, total in zip(rows, losses.sums, strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            mean = model(input_ids=ids, labels=ids).loss
        assert total == pytest.approx(float(mean) * (len(row["input_ids"]) - 1), rel=1e-4)
