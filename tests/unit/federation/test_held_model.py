"""A site that is sent what it lacks has the server's broadcasts and starts, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.codec import pack
from fedlora.federation.compression import Compression, packed
from fedlora.federation.envelope import Header, Message, RefusedMessageError, decode, encode
from fedlora.federation.exchange import Agreement, client_start
from fedlora.federation.held_model import HeldModel, LostModelError
from fedlora.federation.messages import Broadcast
from fedlora.federation.participants import Federation
from fedlora.federation.server import Server, initial_state
from fedlora.federation.site_wire import (
    model_message,
    read_confirmation,
    read_site_message,
    site_message,
)
from fedlora.federation.wire import trained_message
from fedlora.lowrank import Dense, LowRank
from fedlora.methods import METHODS
from fedlora.runs.state_file import settled
from support.simulated import Kept, answer, moved

# Factors of the first are small beside a matrix, those of the second are not.
SHAPES = {"layers/0.q": (70, 60), "layers/0.v": (9, 7)}
F32 = torch.float32
MIXED, EQUAL = (8, 4, 2), (4, 4, 4)


def serve(
    method: str,
    *,
    given: bool = False,
    how: Mapping[str, Any] | None = None,
    compression: Compression = "none",
    **options: Any,
) -> Server:
    rule = METHODS[method]
    ranks = MIXED if rule.mixed_ranks else EQUAL
    agreement = Agreement(rule, rule.options(**options), SHAPES, 5, compression)
    federation = Federation(ranks, [10, 17, 24], agreement, **(how or {}))
    start = None
    if given:
        draw = torch.Generator().manual_seed(1)
        start = {
            name: LowRank(torch.randn(3, n, generator=draw), torch.randn(m, 3, generator=draw))
            for name, (m, n) in SHAPES.items()
        }
    head = {"score.weight": torch.randn(2, 3, generator=torch.Generator().manual_seed(2))}
    return Server(federation, initial_state(federation, start, head), Mean())


class Sites:
    """Three sites, each with what it holds, and a server that knows what they have confirmed."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.models = [HeldModel(server.agreement) for _ in range(3)]
        self.confirmed: dict[int, int | None] = dict.fromkeys(range(3))
        self.bytes: dict[int, dict[int, int]] = {}
        self.kept: Kept = {}

    def header(self) -> Header:
        return Header("run", self.server.state.round + 1, 0, "", "base", "agreement")

    def message(self, client: int, broadcast: Broadcast) -> Message:
        lacking = self.server.lacking(client, self.confirmed[client])
        message = decode(encode(site_message(self.header(), broadcast, lacking)))
        data = pack(packed(lacking.tensors, lacking.compression), {})
        assert len(data) - 8 - int.from_bytes(data[:8], "little") == lacking.nbytes
        return message

    def play(self, away: int | None = None, settle: bool = True, late: int | None = None) -> None:
        """One round; those that are away do not train, and of who is late nothing comes."""
        server = self.server
        number, sent = server.state.round + 1, server.plan()
        self.bytes[number] = {}
        for client, broadcast in sent.items():
            if client == away:
                server.reject(client, "it did not answer", reached=False)
                continue
            message = self.message(client, broadcast)
            site = self.models[client]
            found = site.applied(message)
            assert_same(found, broadcast)
            if client == late:
                server.unconfirmed(client)
                server.reject(client, "it was late", "late")
                self.bytes[number][client] = found.nbytes
                continue
            own = self.kept.get(client)
            starts = [client_start(x, server.agreement, own) for x in (found, broadcast)]
            assert same(vars(starts[0]), vars(starts[1]))
            update = answer(server, found, moved(server, found, 1, F32, self.kept), self.kept)
            up = decode(encode(trained_message(self.header(), [update], {}, site.confirmation())))
            told = read_confirmation(up)
            assert told is not None
            assert not server.has_drifted(told)
            self.confirmed[client] = number - 1
            assert server.accept(update) == ""
            self.bytes[number][client] = found.nbytes
        record = server.commit()
        counted = {c.client: c.bytes_down for c in record.clients if c.client != away}
        assert counted == self.bytes[number]
        if settle:
            server.state = settled(server.state)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, LowRank | Dense):
        return type(one) is type(other) and same(vars(one), vars(other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(x, other[key]) for key, x in one.items())
    return bool(one == other)


def assert_same(found: Broadcast, wanted: Broadcast) -> None:
    """But for the bytes, which the plan counts for a client that has missed nothing."""
    for name, value in vars(wanted).items():
        assert name == "nbytes" or same(vars(found)[name], value), name


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


@pytest.mark.parametrize("options", [{"max_rank": 6}, {"start_fraction": 0.0}])
def test_exact_with_options(options: dict[str, Any]) -> None:
    sites = Sites(serve("exact", **options))
    for number in range(1, 6):
        sites.play(away=0 if number in (2, 3) else None)


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
