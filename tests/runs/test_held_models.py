"""A site holds, over the rounds of every rule, what the server sends, starts from and evaluates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedlora.federation.compression import Compression
from fedlora.federation.envelope import decode, encode
from fedlora.federation.held_model import HeldModel
from fedlora.federation.site_wire import (
    model_message,
)
from fedlora.methods import METHODS
from support.held_models import Sites, same, serve


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_site_has_the_servers_broadcasts_and_starts(method: str, given: bool) -> None:
    sites = Sites(serve(method, given=given))
    for number in range(1, 7):
        if number == 5:  # a new disk
            sites.models[2] = HeldModel(sites.server.agreement)
            sites.confirmed[2] = None
        sites.play(away=1 if number == 3 else None, settle=number % 2 == 0)


@pytest.mark.parametrize("compression", ["bf16", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_a_site_decodes_what_the_server_reckons_with(method: str, compression: Compression) -> None:
    sites = Sites(serve(method, given=True, compression=compression))
    for number in range(1, 6):
        if number == 4:
            sites.models[2] = HeldModel(sites.server.agreement)
            sites.confirmed[2] = None
        sites.play(away=1 if number == 3 else None, settle=number % 2 == 0)


@pytest.mark.parametrize(
    "how",
    [
        {"server_momentum": 0.9},
        {"server_learning_rate": 0.5},
        {"modules": {1: frozenset(["layers/0.v"]), 2: frozenset(["layers/0.q"])}},
        {"clients_per_round": 2},
    ],
)
@pytest.mark.parametrize("method", ["exact", "flora"])
def test_however_the_server_steps_and_whoever_trains_what(method: str, how: Any) -> None:
    sites = Sites(serve(method, how=how))
    for _ in range(5):
        sites.play()


@pytest.mark.parametrize("method", METHODS)
def test_a_site_evaluates_the_servers_global_model_and_holds_it(method: str) -> None:
    sites = Sites(serve(method))
    for number in range(1, 5):
        sites.play(away=1 if number == 2 else None)
        state = sites.server.state
        for client in (0, 1):
            lacking = sites.server.model_lacking(sites.confirmed[client])
            header = replace(sites.header(), round=number)
            message = decode(encode(model_message(header, lacking)))
            found = sites.models[client].evaluated(message)
            for part in ("adapter", "base_delta", "dense"):
                assert same(getattr(found, part), getattr(state, part))
            sites.confirmed[client] = sites.models[client].round
    # What came with the model to be evaluated does not come again with what is to be trained.
    if method in ("exact", "flora"):
        sites.server.plan()
        head = 4 * 6
        assert sites.server.lacking(0, sites.confirmed[0]).nbytes == head
        assert sites.server.lacking(2, sites.confirmed[2]).nbytes > head
