"""A site that is sent what it lacks has the server's broadcasts and starts, to the bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.federation.envelope import Message, RefusedMessageError, decode, encode
from fedlora.federation.held_model import HeldModel, LostModelError
from fedlora.federation.site_wire import (
    model_message,
    read_site_message,
)
from fedlora.lowrank import Dense
from support.held_models import Sites, assert_same, serve


@pytest.mark.parametrize("options", [{"max_rank": 6}, {"start_fraction": 0.0}])
def test_exact_with_options(options: dict[str, Any]) -> None:
    sites = Sites(serve("exact", **options))
    for number in range(1, 6):
        sites.play(away=0 if number in (2, 3) else None)


@pytest.mark.parametrize("method", ["exact", "flora", "rolora"])
def test_a_round_without_an_update_that_counts(method: str) -> None:
    sites = Sites(serve(method))
    for number in range(1, 6):
        if number == 3:
            sites.server.plan()
            for client in range(3):
                sites.server.reject(client, "it did not answer", reached=False)
            sites.server.commit()
        else:
            sites.play()


@pytest.mark.parametrize("method", ["exact", "flora"])
def test_who_was_late_is_sent_the_changes_since_the_round_it_confirmed(method: str) -> None:
    """It has a later model, and takes of the changes what it lacks."""
    sites = Sites(serve(method))
    for number in range(1, 7):
        sites.play(late=1 if number == 5 else None)
        if number == 5:
            assert (sites.confirmed[1], sites.models[1].round) == (3, 4)
    sent, whole = sites.bytes[6], sites.server.model_lacking(None).nbytes
    assert sent[0] < sent[1] < whole
    assert sites.confirmed[1] == 5


@pytest.mark.parametrize("method", ["exact", "flora"])
def test_who_was_away_is_sent_the_changes_since_and_who_lost_it_the_whole(method: str) -> None:
    sites = Sites(serve(method))
    for number in range(1, 9):
        if number == 8:
            sites.models[2], sites.confirmed[2] = HeldModel(sites.server.agreement), None
        sites.play(away=1 if number == 5 else None)
    # The small module, whose factors are larger than a matrix, is sent whole; so is the head.
    stack, small = 4 * 14 * (70 + 60), 4 * 9 * 7 + 4 * 6
    if method == "exact":
        stack += 4 * (14 * (14 + 14) + 6)  # the turn, of 14 directions; six were started from
        small += 4 * 7 * 7  # the basis
    for number in (3, 4, 5, 8):
        assert {
            sites.bytes[number][client] for client in (0, 1) if client in sites.bytes[number]
        } == {stack + small}
    assert sites.bytes[6][1] == sites.bytes[6][0] + stack
    whole = 4 * 70 * 60 if method == "flora" else 4 * (70 * 60 + 14 * 60)
    assert sites.bytes[8][2] == whole + small


@pytest.mark.parametrize("method", ["exact", "flora"])
def test_a_message_that_comes_again_is_not_applied_again(method: str) -> None:
    sites = Sites(serve(method))
    sites.play()
    sites.play()
    broadcast = sites.server.plan()[0]
    message = sites.message(0, broadcast)
    assert_same(sites.models[0].applied(message), broadcast)
    assert_same(sites.models[0].applied(message), broadcast)


def test_changes_of_a_model_that_is_not_held_are_refused() -> None:
    sites = Sites(serve("exact"))
    for _ in range(3):
        sites.play()
    message = sites.message(0, sites.server.plan()[0])
    with pytest.raises(LostModelError, match="rests on the global model of round 2, and here is n"):
        HeldModel(sites.server.agreement).applied(message)
    other = HeldModel(sites.server.agreement, round=1)
    with pytest.raises(LostModelError, match="and here is that of round 1"):
        other.applied(message)
    assert other.round == 1


def test_a_factor_that_is_not_held_is_asked_for() -> None:
    """A site that has evaluated a model, and was never asked to train."""
    sites = Sites(serve("ffa"))
    sites.play(away=1)
    lacking = sites.server.model_lacking(None)
    sites.models[1].evaluated(model_message(replace(sites.header(), round=1), lacking))
    sites.confirmed[1] = 1
    broadcast = sites.server.plan()[1]
    with pytest.raises(LostModelError, match="a factor of layers"):
        sites.models[1].applied(sites.message(1, broadcast))
    sites.confirmed[1] = None
    assert_same(sites.models[1].applied(sites.message(1, broadcast)), broadcast)


@pytest.mark.parametrize("method", ["exact", "flora", "fedex"])
def test_a_model_that_has_drifted_is_noticed(method: str) -> None:
    sites = Sites(serve(method))
    for _ in range(3):
        sites.play()
    server, site = sites.server, sites.models[0]
    site.applied(sites.message(0, server.plan()[0]))
    assert not server.has_drifted(site.confirmation())
    for part in ("adapter", "base_delta"):
        deltas = getattr(site, part)
        if not deltas or (part == "adapter" and method != "exact"):
            continue
        x = deltas["layers/0.q"]
        factor = "W" if isinstance(x, Dense) else "B"
        for change, drifted in ((1e-6, False), (1e-2, True)):
            value = getattr(x, factor)
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
            wrong = replace(x, **{factor: value * (1 + change * noise)})
            setattr(site, part, {**deltas, "layers/0.q": wrong})
            assert server.has_drifted(site.confirmation()) == drifted
        setattr(site, part, deltas)
    assert server.has_drifted({})
    assert server.has_drifted({**site.confirmation(), "layers/0.q": [float("nan")] * 4})


def test_parts_that_do_not_fit_together_are_refused() -> None:
    sites = Sites(serve("exact"))
    for _ in range(2):
        sites.play()
    message = sites.message(0, sites.server.plan()[0])
    assert "increment/2/layers/0.q/turn" in message.tensors
    tensors = dict(message.tensors)

    def changed(**body: Any) -> Message:
        return replace(message, body={**message.body, **body})

    for wrong in (
        changed(held=-1),
        changed(held="2"),
        changed(client=True),
        changed(rank=0),
        changed(places=[]),
        replace(message, body={}),
        replace(message, tensors={**tensors, "increment/2/other/A": torch.ones(1)}),
        replace(message, tensors={**tensors, "nothing": torch.ones(1)}),
        replace(message, tensors={**tensors, "adapter/layers/0.q/W": torch.ones(70, 60)}),
        replace(message, tensors={**tensors, "merge/x/layers/0.q/W": torch.ones(70, 60)}),
        replace(message, tensors={**tensors, "merged/layers/0.q/W": torch.ones(60, 70)}),
        replace(message, tensors={**tensors, "increment/2/layers/0.q/turn": torch.ones(3, 3)}),
        replace(message, tensors={**tensors, "increment/2/layers/0.q/weights": torch.ones(99)}),
    ):
        before = dict(vars(sites.models[0]))
        with pytest.raises(RefusedMessageError):
            sites.models[0].applied(decode(encode(wrong)))
        assert vars(sites.models[0]) == before
    assert read_site_message(message).lacking.held == 1
