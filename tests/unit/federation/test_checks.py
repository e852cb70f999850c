"""What a federation cannot work with: settings that do not fit a rule, and wrong updates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.errors import InputError
from fedlora.federation.checks import check_rule, check_server_step, check_shapes, not_finite
from fedlora.federation.messages import ClientUpdate
from fedlora.lowrank import LowRank
from fedlora.methods import METHODS
from support.simulated import serve, train


def sent_and_update(method: str = "exact", **how: Any) -> tuple[Any, Any, ClientUpdate]:
    """The first client's broadcast and an honest update."""
    server = serve(method, **how)
    sent = server.plan()[0]
    return server, sent, train(server, sent)


def test_mixed_ranks_where_a_rule_cannot_combine_them() -> None:
    check_rule(METHODS["fedit"], [4, 4])
    with pytest.raises(InputError, match=r"fedit needs one rank .* client_ranks 4 2; .*exact"):
        check_rule(METHODS["fedit"], [4, 2])
    for rule in METHODS.values():
        if rule.mixed_ranks:
            check_rule(rule, [4, 2])


def test_a_server_step_where_it_has_no_meaning() -> None:
    for rule in METHODS.values():
        check_server_step(rule, 1.0, 0.0)
        if not rule.server_optimiser:
            with pytest.raises(InputError, match=f"{rule.name} divides by weights of its own"):
                check_server_step(rule, 0.5, 0.0)
        elif not rule.server_momentum:
            check_server_step(rule, 0.5, 0.0)
            with pytest.raises(InputError, match=f"{rule.name} trains something else in every"):
                check_server_step(rule, 1.0, 0.9)
        else:
            check_server_step(rule, 0.5, 0.9)


def test_modules_ranks_and_parameters_that_nobody_asked_for() -> None:
    server, sent, update = sent_and_update(dense={"head": torch.zeros(2)})
    check_shapes(update, sent, server.agreement)
    x = update.adapter["attn"]
    smaller = {**update.adapter, "attn": LowRank(x.A[:1], x.B[:, :1])}
    without = {name: x for name, x in update.adapter.items() if name != "attn"}
    for adapter in (smaller, without):
        with pytest.raises(ValueError, match="client 0 sent modules, shapes or ranks other than"):
            check_shapes(replace(update, adapter=adapter), sent, server.agreement)
    for dense in ({}, {"head": torch.zeros(3)}):
        with pytest.raises(ValueError, match="client 0 sent dense parameters other than"):
            check_shapes(replace(update, dense=dense), sent, server.agreement)


def test_a_client_of_some_modules_sends_just_these() -> None:
    server, sent, update = sent_and_update(modules={0: frozenset({"gate"})})
    check_shapes(update, sent, server.agreement)
    assert update.adapter.keys() == {"gate"}


def test_values_that_are_not_finite_are_named_where_they_are_sent() -> None:
    _, _, update = sent_and_update()
    assert not_finite(update) == ""
    x = update.adapter["gate"]
    broken = {**update.adapter, "gate": LowRank(x.A, x.B * float("nan"))}
    assert not_finite(replace(update, adapter=broken)) == "gate"
    assert not_finite(replace(update, adapter=broken, sends="A")) == ""
    assert not_finite(replace(update, dense={"head": torch.tensor([float("inf")])})) == "head"
