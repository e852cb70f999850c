"""Turns broadcasts, updates and clients' states into messages that can be sent as bytes, and back.

Clients of one rank are sent the same tensors, and everybody is sent the same frozen side. So a
message that asks several clients to train holds every *group* of tensors (an adapter, its leading
directions, what was merged, the parameters trained whole) once, and each client's entry names its
groups. A reader that keeps the groups of a round can be sent the next clients without them.

What comes out of a message lies in memory as new, like what never went through one. So a client
computes the same bits from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fedlora.federation.compression import Compression
from fedlora.federation.envelope import Header, Message, RefusedMessageError
from fedlora.federation.increments import Sketch
from fedlora.federation.messages import (
    Broadcast,
    ClientState,
    ClientUpdate,
    adapter_of,
)
from fedlora.lowrank import Delta, Dense, LowRank
from fedlora.methods.rule import Shapes
from fedlora.methods.values import RoundNumbers

TRAIN = "train"
"""The kind of a message that asks clients to train."""
TRAINED = "trained"
"""The kind of a message that brings their updates."""

Group = Mapping[str, Delta] | Mapping[str, Tensor]
Groups = dict[str, Any]
"""Name -> group, of one round."""

_DELTAS = ("adapter", "leading", "base_delta")  # fields of a broadcast that are groups
_FIELDS = (*_DELTAS, "dense")


@dataclass
class GroupNames:
    """Gives every group of a round a name, the same one to the same tensors.

    Args:
        names: which tensors -> the group's name.
        held: the groups by name. They are held so that no other tensor takes their place in memory.
        first: which tensor -> where it belongs (`group/module/factor`) for the first time.
    """

    names: dict[tuple[Any, ...], str] = field(default_factory=dict)
    held: Groups = field(default_factory=dict)
    first: dict[int, str] = field(default_factory=dict)

    def of(self, group: Group) -> str:
        """The name of this group."""
        key = tuple((name, *map(id, _tensors(value).values())) for name, value in group.items())
        if key not in self.names:
            self.names[key] = f"g{len(self.names)}"
            self.held[self.names[key]] = group
            for place, value in self.tensors(self.names[key]):
                self.first.setdefault(id(value), place)
        return self.names[key]

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a group, each with where it belongs."""
        for module, value in self.held[name].items():
            for factor, tensor in _tensors(value).items():
                yield f"{name}/{module}/{factor}", tensor


def train_message(
    header: Header,
    broadcasts: Sequence[Broadcast],
    states: Mapping[int, ClientState],
    names: GroupNames,
    known: frozenset[str] = frozenset(),
) -> tuple[Message, frozenset[str]]:
    """Asks clients to train.

    Args:
        header: its kind is set here.
        broadcasts: one for each client, all of one round.
        states: client number -> what it goes on with, for those that have something; only for a
            reader that trains on the clients' behalf and keeps nothing.
        names: of the round's groups.
        known: names of the groups that the reader holds already.

    Returns:
        The message, and the names of all groups that the reader holds afterwards.
    """
    clients = [_entry(broadcast, names) for broadcast in broadcasts]
    used = {entry["groups"][field] for entry in clients for field in _FIELDS}
    new = sorted(used - known, key=lambda name: int(name[1:]))
    tensors, same = dict[str, Tensor](), dict[str, str]()
    for place, value in (item for name in new for item in names.tensors(name)):
        first = names.first[id(value)]
        if first != place and first.split("/", 1)[0] in used | known:
            same[place] = first
        else:
            tensors[place] = value
    tensors |= {
        f"state/{broadcast.client}/{name}": value
        for broadcast in broadcasts
        if broadcast.client in states
        for name, value in states[broadcast.client].factors.items()
    }
    numbers = broadcasts[0].numbers
    body = {
        "clients": clients,
        "groups": {name: list(names.held[name]) for name in new},
        "same": same,
        "widths": dict(numbers.widths),
        "levels": list(numbers.levels),
    }
    return Message(replace(header, kind=TRAIN), body, tensors), known | frozenset(new)


def read_train(message: Message, groups: Groups) -> tuple[list[Broadcast], dict[int, ClientState]]:
    """The inverse of `train_message`.

    Args:
        message: of that kind.
        groups: the groups of this round that came before; those that came with it are added.

    Raises:
        RefusedMessageError: it is not what such a message has to be.
    """
    with refusing():
        body = message.body
        groups.update({name: dict.fromkeys(of) for name, of in body["groups"].items()})
        states: dict[int, dict[str, Tensor]] = {}
        parts: dict[tuple[str, str], dict[str, Tensor]] = {}
        for full_name, value in message.tensors.items():
            group, rest = full_name.split("/", 1)
            if group == "state":
                client, name = rest.split("/", 1)
                states.setdefault(int(client), {})[name] = value
            else:
                group, module, factor = _parted(full_name)
                parts.setdefault((group, module), {})[factor] = value
        for place, first in body["same"].items():
            group, module, factor = _parted(place)
            earlier, earlier_module, earlier_factor = _parted(first)
            value = (
                parts[earlier, earlier_module]
                if (earlier, earlier_module) in parts
                else _tensors(groups[earlier][earlier_module])
            )[earlier_factor]
            parts.setdefault((group, module), {})[factor] = value
        for (group, module), factors in parts.items():
            if group not in body["groups"] or module not in groups[group]:
                raise ValueError(module)
            groups[group][module] = _value(factors)
        if any(value is None for group in body["groups"] for value in groups[group].values()):
            raise ValueError("a module without tensors")
        numbers = round_numbers(body)
        broadcasts = [
            Broadcast(
                round=message.header.round,
                client=whole_number(entry["client"]),
                rank=whole_number(entry["rank"], least=1),
                nbytes=whole_number(entry["nbytes"]),
                numbers=numbers,
                modules=None if entry["modules"] is None else frozenset(entry["modules"]),
                **{field: groups[entry["groups"][field]] for field in _FIELDS},
            )
            for entry in body["clients"]
        ]
        return broadcasts, {client: ClientState(factors) for client, factors in states.items()}


def round_numbers(body: Mapping[str, Any]) -> RoundNumbers:
    """The public numbers of a round, in the body of a message."""
    return RoundNumbers(
        {str(name): whole_number(width) for name, width in body["widths"].items()},
        tuple(whole_number(level) for level in body["levels"]),
    )


def trained_message(
    header: Header,
    updates: Sequence[ClientUpdate],
    states: Mapping[int, ClientState],
    confirmation: Sketch | None = None,
    compression: Compression = "none",
) -> Message:
    """Brings what clients have trained.

    Args:
        header: its kind is set here.
        updates: of clients of one round.
        states: client number -> what it goes on with; of a site that keeps its clients' states
            itself there are none.
        confirmation: of a site that keeps the global model: `HeldModel.confirmation`.
        compression: what the updates were rounded to.
    """
    tensors = {
        f"{update.client}/{name}": value
        for update in updates
        for name, value in update.tensors.items()
    }
    tensors |= {
        f"state/{client}/{name}": value
        for client, state in states.items()
        for name, value in state.factors.items()
    }
    clients = [
        {
            "client": update.client,
            "num_examples": update.num_examples,
            "sends": update.sends,
            "metrics": {key: _finite(value) for key, value in update.metrics.items()},
        }
        for update in updates
    ]
    body: dict[str, Any] = {"clients": clients}
    if confirmation is not None:
        body["confirmation"] = {name: [_finite(x) for x in of] for name, of in confirmation.items()}
    return Message(replace(header, kind=TRAINED), body, tensors, compression)


def read_trained(
    message: Message, modules: Mapping[int, Shapes]
) -> tuple[list[ClientUpdate], dict[int, ClientState]]:
    """The inverse of `trained_message`.

    Args:
        message: of that kind.
        modules: client number -> the shapes `(m, n)` of the modules it was asked to train. Answers
            of other clients are refused.

    Raises:
        RefusedMessageError: it is not what such a message has to be.
    """
    with refusing():
        states: dict[int, dict[str, Tensor]] = {}
        sent: dict[int, dict[str, Tensor]] = {}
        for full_name, value in message.tensors.items():
            whose, name = full_name.split("/", 1)
            if whose == "state":
                client, name = name.split("/", 1)
                states.setdefault(int(client), {})[name] = value
            else:
                sent.setdefault(int(whose), {})[name] = value
        updates = [
            _update(entry, message.header.round, modules, sent) for entry in message.body["clients"]
        ]
        return updates, {client: ClientState(factors) for client, factors in states.items()}


def _update(
    entry: Mapping[str, Any],
    round: int,
    modules: Mapping[int, Shapes],
    sent: Mapping[int, Mapping[str, Tensor]],
) -> ClientUpdate:
    client, sends = whole_number(entry["client"]), entry["sends"]
    tensors = sent.get(client, {})
    if sends not in ("AB", "A", "B"):
        raise ValueError("sends")
    factors = {key for key in tensors if not key.startswith("dense/")}
    if factors != {f"{factor}/{name}" for name in modules[client] for factor in sends}:
        raise ValueError("modules")
    metrics = {str(key): _metric(value) for key, value in entry["metrics"].items()}
    return ClientUpdate(
        client=client,
        round=round,
        adapter=adapter_of(tensors, modules[client]),
        num_examples=whole_number(entry["num_examples"]),
        dense={n.removeprefix("dense/"): x for n, x in tensors.items() if n.startswith("dense/")},
        metrics=metrics,
        sends=sends,
    )


def _entry(broadcast: Broadcast, names: GroupNames) -> dict[str, Any]:
    """A client's entry in a message; its tensors are named by their groups."""
    return {
        "client": broadcast.client,
        "rank": broadcast.rank,
        "nbytes": broadcast.nbytes,
        "modules": None if broadcast.modules is None else sorted(broadcast.modules),
        "groups": {field: names.of(getattr(broadcast, field)) for field in _FIELDS},
    }


def _tensors(value: Delta | Tensor) -> dict[str, Tensor]:
    """The tensors of one entry of a group, by factor."""
    if isinstance(value, LowRank):
        return {"A": value.A, "B": value.B}
    return {"W": value.W} if isinstance(value, Dense) else {"value": value}


def _parted(place: str) -> tuple[str, str, str]:
    """Group, module and factor of `group/module/factor`; a module's name may hold slashes."""
    group, rest = place.split("/", 1)
    module, factor = rest.rsplit("/", 1)
    return group, module, factor


def _value(factors: Mapping[str, Tensor]) -> Delta | Tensor:
    """The inverse of `_tensors`."""
    if set(factors) == {"A", "B"}:
        return LowRank(factors["A"], factors["B"])
    ((factor, value),) = factors.items()
    if factor == "W" and value.ndim == 2:
        return Dense(value)
    if factor != "value":
        raise ValueError(factor)
    return value


def whole_number(value: Any, least: int = 0) -> int:
    """A whole number of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{value!r} is no number")
    return value


def _metric(value: Any) -> float | str | None:
    if value is not None and not isinstance(value, int | float | str):
        raise TypeError("a metric is a number or text")
    return value


def _finite(value: Any) -> Any:
    """JSON has no NaN; a metric that is not finite travels as null, as it is logged."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def refusing() -> Iterator[None]:
    """Whatever is wrong with the parts of a message is one kind of refusal."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise RefusedMessageError(
            f"its parts do not fit together ({type(error).__name__}: {str(error)[:80]})"
        ) from None
