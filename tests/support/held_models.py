"""Lets three sites that hold what they are sent play rounds with a server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.codec import pack
from fedlora.federation.compression import Compression, packed
from fedlora.federation.envelope import Header, Message, decode, encode
from fedlora.federation.exchange import Agreement, client_start
from fedlora.federation.held_model import HeldModel
from fedlora.federation.messages import Broadcast
from fedlora.federation.participants import Federation
from fedlora.federation.server import Server, initial_state
from fedlora.federation.site_wire import (
    read_confirmation,
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
