"""Which evaluation is the best one so far."""

from __future__ import annotations

from fedlora.runs.best_round import Best


def test_the_best_evaluation() -> None:
    best = Best()
    for number, loss in enumerate([4.0, 3.0, float("nan"), 3.0, 5.0]):
        best = best.after(number, loss, greater=False)
    assert best == Best(1, 3.0, 3)
    assert best.after(5, 2.0, greater=False) == Best(5, 2.0)
    assert best.after(5, 2.0, greater=True) == Best(1, 3.0, 4)
    assert best.after(5, 9.0, greater=True) == Best(5, 9.0)
