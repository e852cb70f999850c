"""Messages: the bytes of an update are those of the factors that travel."""

from __future__ import annotations

import pytest
import torch

from fedlora.federation.messages import ClientState, ClientUpdate
from fedlora.lowrank import LowRank

ADAPTER = {"m": LowRank(torch.zeros(2, 8), torch.zeros(6, 2))}


@pytest.mark.parametrize(("sends", "values"), [("AB", 2 * 8 + 6 * 2), ("A", 2 * 8), ("B", 6 * 2)])
def test_bytes_of_the_factors_that_are_sent(sends: str, values: int) -> None:
    update = ClientUpdate(client=0, round=1, adapter=ADAPTER, num_examples=3, sends=sends)
    assert update.nbytes == 4 * values


def test_a_client_without_a_state_keeps_nothing() -> None:
    assert dict(ClientState().factors) == {}
