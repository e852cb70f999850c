"""A message for one client, what it brings, and what a site confirms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedlora.federation.envelope import Header, RefusedMessageError, decode, encode
from fedlora.federation.messages import Broadcast, Lacking
from fedlora.federation.site_wire import read_confirmation, read_site_message, site_message
from fedlora.federation.wire import trained_message
from fedlora.methods.values import RoundNumbers

HEADER = Header("run", 3, 0, "", "base", "agreement")
NUMBERS = RoundNumbers({"layers/0.q": 4}, (2, 4))
LACKING = Lacking(
    1,
    {"increment/2/layers/0.q/A": torch.randn(2, 3), "beyond/layers/0.q/A": torch.randn(1, 3)},
    {"beyond/layers/0.q/A": [1]},
)


def broadcast(modules: frozenset[str] | None = None) -> Broadcast:
    return Broadcast(3, 7, 4, {}, {}, {}, {}, LACKING.nbytes, NUMBERS, modules)


@pytest.mark.parametrize("modules", [None, frozenset(["layers/0.q"])])
def test_what_a_client_is_asked_comes_back(modules: frozenset[str] | None) -> None:
    sent = broadcast(modules)
    asked = read_site_message(decode(encode(site_message(HEADER, sent, LACKING))))
    for name in ("client", "rank", "nbytes", "numbers", "modules"):
        assert getattr(asked, name) == getattr(sent, name)
    assert (asked.lacking.held, asked.lacking.places) == (1, LACKING.places)
    assert asked.lacking.tensors.keys() == LACKING.tensors.keys()
    for name, value in asked.lacking.tensors.items():
        assert torch.equal(value, LACKING.tensors[name])


def test_a_client_that_holds_nothing() -> None:
    message = site_message(HEADER, broadcast(), replace(LACKING, held=None))
    assert read_site_message(decode(encode(message))).lacking.held is None


def test_a_confirmation_comes_back_and_nan_stays_nan() -> None:
    told = {"layers/0.q": [0.1, math.nan, -3.0, 1e-30]}
    message = decode(encode(trained_message(HEADER, [], {}, told)))
    found = read_confirmation(message)
    assert found is not None
    assert math.isnan(found["layers/0.q"][1])
    assert [found["layers/0.q"][i] for i in (0, 2, 3)] == [0.1, -3.0, 1e-30]
    assert read_confirmation(trained_message(HEADER, [], {})) is None


@pytest.mark.parametrize("told", [3, {"a": 3}, {"a": ["x"]}, {"a": [[1]]}])
def test_a_confirmation_of_another_shape_is_refused(told: object) -> None:
    message = trained_message(HEADER, [], {})
    with pytest.raises(RefusedMessageError):
        read_confirmation(replace(message, body={**message.body, "confirmation": told}))
