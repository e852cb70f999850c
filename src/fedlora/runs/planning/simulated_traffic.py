"""Counts what a method would transfer, by a server that runs on small matrices of random numbers.

A server counts the bytes of its rounds by itself. Here one runs for each shape of module, with
ranks and sides divided by what all of them have in common, `u`: all that is counted, `r (m + n)` of
factors and `m n` of whole matrices, is then exactly `u^2` times smaller, and is multiplied back.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.compression import BYTES
from fedlora.federation.exchange import Agreement, client_start
from fedlora.federation.messages import Broadcast, ClientUpdate
from fedlora.federation.participants import Federation
from fedlora.federation.server import Server, initial_state
from fedlora.lowrank import LowRank
from fedlora.methods.rule import Rule
from fedlora.runs.state_file import state_to_tensors

SHORT, LONG = 4, 24
"""Rounds that are played, where matrices are large and where they are small."""
SMALL = 1024
"""The longest side of a small matrix."""


@dataclass(frozen=True)
class Traffic:
    """What a method transfers and keeps, in bytes.

    Args:
        up, down: of all clients, in the last round.
        all_up, all_down: of all clients, in all rounds.
        model: the whole global update, as a client that holds nothing is sent it.
        state: what the server keeps between two rounds.
        updates: what the clients of a round send together.
        adds_to_base: clients hold a part of the global update frozen beside the base.
        played: rounds that were played; the others are taken to be like the last one.
    """

    up: int
    down: int
    all_up: int
    all_down: int
    model: int
    state: int
    updates: int
    adds_to_base: bool
    played: int


def traffic(
    federation: Federation, rule: Rule, options: Any, num_rounds: int, dense: int = 0
) -> Traffic:
    """What all clients transfer with a rule, and what the server keeps.

    Modules that single clients leave out (`lora_target_modules` of their own) are counted, and
    int8's scales are not.

    Args:
        federation: who takes part; the rule of its agreement is not read.
        rule: that adds the adapters up.
        options: of the rule.
        num_rounds: of the run.
        dense: numbers of the modules that are trained whole.
    """
    unit = _common_divisor(federation, options)
    played = min(num_rounds, LONG if _longest(federation) // unit <= SMALL else SHORT)
    total = _Counted.nothing(played)
    for shape, number in Counter(federation.shapes.values()).items():
        total = total.plus(_play(federation, rule, options, shape, unit, played), number * unit**2)
    numbers = BYTES[federation.agreement.compression] / BYTES["none"]
    asked = [len(federation.sample(number)) for number in range(1, num_rounds + 1)]
    up = [round(x * numbers) + 4 * dense * n for x, n in zip(total.up, asked, strict=False)]
    down = [round(x * numbers) + 4 * dense * n for x, n in zip(total.down, asked, strict=False)]
    later = num_rounds - played
    return Traffic(
        up=up[-1],
        down=down[-1],
        all_up=sum(up) + later * up[-1],
        all_down=sum(down) + later * down[-1],
        model=total.model + 4 * dense,
        state=total.state + 4 * dense,
        updates=total.up[-1] + 4 * dense * asked[-1],
        adds_to_base=total.adds_to_base,
        played=played,
    )


def adds_to_base(rule: Rule, options: Any) -> bool:
    """Whether clients hold a part of the global update frozen beside the base after a round."""
    agreement = Agreement(rule, rule.options(), {"module": (16, 16)})
    return _play(Federation([4, 4], [1, 1], agreement), rule, options, (16, 16), 1, 2).adds_to_base


def moved_update(server: Server, sent: Broadcast, generator: torch.Generator) -> ClientUpdate:
    """What a client sends whose trained factors have moved by random numbers."""
    training = server.agreement.training
    trains = training.trained(sent.round)

    def moved(x: Tensor, factor: str) -> Tensor:
        if factor not in trains:
            return x
        return x + 0.01 * torch.randn(x.shape, generator=generator)

    trained = {
        name: LowRank(moved(x.A, "A"), moved(x.B, "B"))
        for name, x in client_start(sent, server.agreement).adapter.items()
    }
    return ClientUpdate(sent.client, sent.round, trained, 100, sends=training.sent(sent.round))


@dataclass(frozen=True)
class _Counted:
    """Bytes of some modules: of each round that was played, and after the last of them."""

    up: Sequence[int]
    down: Sequence[int]
    model: int
    state: int
    adds_to_base: bool

    @staticmethod
    def nothing(rounds: int) -> _Counted:
        """Of no module."""
        return _Counted([0] * rounds, [0] * rounds, 0, 0, False)

    def plus(self, other: _Counted, times: int) -> _Counted:
        """With so many modules more, each of which counts as the other does."""
        return _Counted(
            [x + times * y for x, y in zip(self.up, other.up, strict=True)],
            [x + times * y for x, y in zip(self.down, other.down, strict=True)],
            self.model + times * other.model,
            self.state + times * other.state,
            self.adds_to_base or other.adds_to_base,
        )


def _play(
    federation: Federation,
    rule: Rule,
    options: Any,
    shape: tuple[int, int],
    unit: int,
    rounds: int,
) -> _Counted:
    """Rounds with one module, everything divided by the unit."""
    m, n = shape
    small = Agreement(rule, _in_units(options, unit), {"module": (m // unit, n // unit)})
    server_of = replace(
        federation, agreement=small, ranks=[r // unit for r in federation.ranks], modules={}
    )
    server = Server(server_of, initial_state(server_of), Mean())
    generator = torch.Generator().manual_seed(0)
    up, down, adds_to_base = [], [], False
    for _ in range(rounds):
        for sent in server.plan().values():
            shared = client_start(sent, server.agreement).shared
            adds_to_base = bool(shared or sent.base_delta)
            server.accept(moved_update(server, sent, generator))
        record = server.commit()
        up.append(record.bytes_up)
        down.append(record.bytes_down)
    return _Counted(
        up,
        down,
        server.model_lacking(None).nbytes,
        sum(x.nbytes for x in state_to_tensors(server.state).values()),
        adds_to_base,
    )


def _longest(federation: Federation) -> int:
    return max(max(shape) for shape in federation.shapes.values())


def _common_divisor(federation: Federation, options: Any) -> int:
    """What all ranks and all sides of modules can be divided by, with 4 left of each rank.

    Rules take shares of ranks, which would round to nothing.
    """
    sides = [side for shape in federation.shapes.values() for side in shape]
    common = math.gcd(*sides, *federation.ranks, *_ranks_among(options).values())
    largest = max(1, min(federation.ranks) // 4)
    return next(unit for unit in range(min(common, largest), 0, -1) if common % unit == 0)


def _in_units(options: Any, unit: int) -> Any:
    """A rule's options, with the ranks among them divided."""
    ranks = {name: rank // unit for name, rank in _ranks_among(options).items()}
    return dataclasses.replace(options, **ranks)


def _ranks_among(options: Any) -> dict[str, int]:
    values = dataclasses.asdict(options)
    return {name: x for name, x in values.items() if "rank" in name and type(x) is int}
