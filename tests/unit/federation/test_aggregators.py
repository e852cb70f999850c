"""The aggregator is given to the server, and is an axis of its own beside the rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.federation.aggregators import Aggregator
from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.server import Server
from fedlora.lowrank import Dense, to_dense
from fedlora.methods import METHODS
from fedlora.methods.values import Encoded
from support.simulated import (
    SHAPES,
    combine,
    distance,
    matrices,
    model,
    play,
    random_adapter,
    ranks_for,
    serve,
    size,
    train,
)


class Median:
    """The median of every number, whatever the weights: robust, and no mean."""

    is_mean = False

    def __init__(self) -> None:
        self.rounds = 0
        self.begin()

    def begin(self) -> None:
        self.folded: list[Encoded] = []
        self.weight = 0.0

    def fold(self, encoded: Encoded, weight: float) -> None:
        self.folded.append(encoded)
        self.weight += weight

    def result(self, normalised: bool = True) -> Encoded:
        self.rounds += 1
        factors = {
            name: torch.stack([x.factors[name] for x in self.folded]).median(dim=0).values
            for name in self.folded[0].factors
        }
        products = {
            name: Dense(
                torch.stack([to_dense(x.products[name]) for x in self.folded]).median(dim=0).values
            )
            for name in self.folded[0].products
        }
        return Encoded(factors, products, self.folded[0].weights)


def with_aggregator(server: Server, aggregator: Aggregator) -> Server:
    return Server(server.federation, server.state, aggregator)


class Witness(Mean):
    """A mean that notes what it is asked to do."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        super().__init__()

    def begin(self) -> None:
        self.calls.append("begin")
        super().begin()

    def fold(self, encoded: Encoded, weight: float) -> None:
        self.calls.append(weight)
        super().fold(encoded, weight)

    def result(self, normalised: bool = True) -> Encoded:
        self.calls.append(("result", normalised))
        return super().result(normalised)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_a_round_begins_folds_in_client_order_and_asks_for_the_result(order: list[int]) -> None:
    witness = Witness()
    server = with_aggregator(serve("exact"), witness)
    for _ in range(2):
        witness.calls.clear()
        play(server, order=order)
        assert witness.calls[0] == "begin"
        assert witness.calls[1:-1] == [10.0, 17.0, 24.0, 31.0, ("result", True)]
        assert witness.calls[-1] == "begin"  # nothing of a closed round is held
        assert not witness.factors
        assert not witness.products


def test_with_no_update_that_counts_no_result_is_asked_for() -> None:
    witness = Witness()
    server = with_aggregator(serve("exact"), witness)
    server.plan()
    server.commit()
    assert set(witness.calls) == {"begin"}


@pytest.mark.parametrize("method", ["exact", "flora", "fedmomentum"])
def test_a_robust_aggregator_takes_the_place_of_the_mean(method: str) -> None:
    """The model changes by the median; the error says how far that is from the weighted mean."""
    median = Median()
    server = with_aggregator(serve(method), median)
    for seed in range(1, 4):
        before = model(server)
        done = play(server, seed)
        learnt = [
            combine((1.0, matrices(done.ended[k])), (-1.0, matrices(done.starts[k].adapter)))
            for k in done.sent
        ]
        wanted = {
            name: torch.stack([x[name] for x in learnt]).median(dim=0).values for name in SHAPES
        }
        change = combine((1.0, model(server)), (-1.0, before))
        assert distance(change, wanted) <= 1e-12 * (size(wanted) + size(before))
        assert done.record.aggregation_error == pytest.approx(done.error, rel=1e-6)
        assert done.error > 0.1
    assert median.rounds == 3


@pytest.mark.parametrize("method", METHODS)
def test_what_one_client_alone_sends_is_both_mean_and_median(method: str) -> None:
    """With the shift in what is folded, a rule needs to know nothing of the aggregator."""
    ranks = ranks_for(METHODS[method])
    mean = serve(method, ranks, random_adapter(max(ranks), 1))
    median = with_aggregator(mean, Median())
    for server in (mean, median):
        sent = server.plan()
        server.accept(train(server, sent[1]))
        server.commit()
    assert distance(model(mean), model(median)) <= 1e-11 * size(model(mean))
