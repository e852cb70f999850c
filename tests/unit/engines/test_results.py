"""A result of a client that trained elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from fedlora.engines.results import asked_modules, result_of
from fedlora.federation.exchange import Agreement
from fedlora.federation.messages import Broadcast, ClientUpdate
from fedlora.lowrank import LowRank
from fedlora.methods import METHODS
from fedlora.methods.values import RoundNumbers

SHAPES = {"b": (4, 3), "a": (2, 3)}


def broadcast(**more: Any) -> Broadcast:
    return Broadcast(1, 0, 1, {}, {}, {}, {}, 0, RoundNumbers({}, (1,)), **more)


def test_modules_come_in_the_order_of_the_federation() -> None:
    assert asked_modules(broadcast(), SHAPES) == SHAPES
    assert list(asked_modules(broadcast(modules=frozenset(["a", "b"])), SHAPES)) == ["b", "a"]
    assert asked_modules(broadcast(modules=frozenset(["a"])), SHAPES) == {"a": (2, 3)}


def test_the_model_is_what_was_sent_and_what_came_back() -> None:
    rule = METHODS["fedit"]
    agreement = Agreement(rule, rule.options(), {"a": (2, 3)}, 0)
    sent = LowRank(torch.ones(1, 3), torch.zeros(2, 1))
    given = Broadcast(1, 0, 1, {"a": sent}, {"a": sent}, {}, {}, 0, RoundNumbers({"a": 1}, (1,)))
    trained = LowRank(torch.full((1, 3), 2.0), torch.ones(2, 1))
    result = result_of(given, ClientUpdate(0, 1, {"a": trained}, 5), agreement)
    assert result.client == 0
    (x,) = result.model().values()
    assert isinstance(x, LowRank)
    assert torch.allclose(x.B @ x.A, torch.full((2, 3), 2.0, dtype=x.A.dtype))
