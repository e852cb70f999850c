"""Turns the server's and the clients' state into named tensors and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.federation.messages import ClientState
from fedlora.lowrank import Delta, Deltas, Dense, LowRank
from fedlora.methods.values import Change, Encoded, Increment, ServerState

Tensors = dict[str, Tensor]

KEPT_ROUNDS = "changes/rounds"
"""The tensor that says of which rounds the changes are kept."""


def state_to_tensors(state: ServerState) -> Tensors:
    """Every tensor of a server state under a name of its own, as a safetensors file can hold them.

    After a round, momentum and merge may be the same tensors; a file cannot hold what shares memory
    with another, so the second of them is copied.
    """
    tensors = {name: value.contiguous() for name, value in _named(state).items()}
    seen = set[int]()
    for name, value in tensors.items():
        where = value.untyped_storage().data_ptr()
        tensors[name] = value.clone() if where in seen else value
        seen.add(where)
    return tensors


def state_from_tensors(
    tensors: Mapping[str, Tensor],
    round: int,
    last_seen: Mapping[int, int],
    ranks: Mapping[int, int],
) -> ServerState:
    """The inverse of `state_to_tensors`."""
    last_merge = _deltas(tensors, "last_merge")
    return ServerState(
        round=round,
        adapter=_deltas(tensors, "adapter"),
        base_delta=_deltas(tensors, "base_delta"),
        dense=_group(tensors, "dense"),
        last_merge=last_merge,
        last_seen=dict(last_seen),
        ranks=dict(ranks),
        momentum=Encoded(
            _group(tensors, "momentum_factors"), _deltas(tensors, "momentum_products")
        ),
        leading=_factor_pairs(tensors, "leading"),
        changes=_changes(tensors, round, last_merge),
        unsent=_deltas(tensors, "unsent"),
    )


def settled(state: ServerState) -> ServerState:
    """The state as it is after saving and loading it: the same numbers, laid out the same way.

    Results depend in their last bits on strides, alignment and the order of sums. A run that goes
    on from the settled state after every round takes the same course as one resumed there.
    """
    return state_from_copies(_named(state), state.round, state.last_seen, state.ranks)


def state_from_copies(
    tensors: Mapping[str, Tensor],
    round: int,
    last_seen: Mapping[int, int],
    ranks: Mapping[int, int],
) -> ServerState:
    """As `state_from_tensors`, of copies: a loaded state is laid out as a settled one."""
    return state_from_tensors(_copies(tensors), round, last_seen, ranks)


def clients_to_tensors(clients: Mapping[int, ClientState]) -> Tensors:
    """Every tensor of all clients' states as `client/module.B`."""
    return {f"{k}/{n}": t for k, state in sorted(clients.items()) for n, t in state.factors.items()}


def clients_from_tensors(tensors: Mapping[str, Tensor]) -> dict[int, ClientState]:
    """The inverse of `clients_to_tensors`."""
    factors: dict[int, Tensors] = {}
    for key, value in _copies(tensors).items():
        client, _, name = key.partition("/")
        factors.setdefault(int(client), {})[name] = value
    return {client: ClientState(own) for client, own in sorted(factors.items())}


def _copies(tensors: Mapping[str, Tensor]) -> Tensors:
    """Copies of all tensors, each row after row in memory of its own, in the order of names."""
    return {k: tensors[k].clone(memory_format=torch.contiguous_format) for k in sorted(tensors)}


def _named(state: ServerState) -> Tensors:
    """Every tensor of a server state under a name of its own; some may share memory."""
    return {
        **_factors("adapter", state.adapter),
        **_factors("base_delta", state.base_delta),
        **_factors("last_merge", state.last_merge),
        **_factors("momentum_products", state.momentum.products),
        **{f"momentum_factors/{name}": value for name, value in state.momentum.factors.items()},
        **{f"dense/{name}": value for name, value in state.dense.items()},
        **_factors("leading", state.leading),
        **_factors("unsent", state.unsent),
        **_named_changes(state),
    }


def _named_changes(state: ServerState) -> Tensors:
    """What the last rounds have changed, and which they are; `last_merge` is named already."""
    if not state.changes:
        return {}
    tensors: Tensors = {KEPT_ROUNDS: torch.tensor(sorted(state.changes))}
    for number, change in state.changes.items():
        if number != state.round:
            tensors |= _factors(f"merges/{number}", change.merge)
        for name, x in change.increments.items():
            parts = {"A": x.stack.A, "B": x.stack.B, "weights": x.weights}
            parts |= {} if x.turn is None else {"turn": x.turn}
            tensors |= {f"increments/{number}/{name}/{k}": value for k, value in parts.items()}
    return tensors


def _factors(group: str, deltas: Deltas) -> Tensors:
    """The factors A and B of updates, or W where an update is dense, as `group/module/factor`."""
    tensors: Tensors = {}
    for name, x in deltas.items():
        parts = {"W": x.W} if isinstance(x, Dense) else {"A": x.A, "B": x.B}
        tensors |= {f"{group}/{name}/{factor}": value for factor, value in parts.items()}
    return tensors


def _deltas(tensors: Mapping[str, Tensor], group: str) -> dict[str, Delta]:
    """The inverse of `_factors`."""
    modules: dict[str, Tensors] = {}
    for key, value in _group(tensors, group).items():
        name, _, factor = key.rpartition("/")
        modules.setdefault(name, {})[factor] = value
    return {
        name: Dense(parts["W"]) if "W" in parts else LowRank(parts["A"], parts["B"])
        for name, parts in modules.items()
    }


def _factor_pairs(tensors: Mapping[str, Tensor], group: str) -> dict[str, LowRank]:
    """The updates of a group that are always factors."""
    return {name: x for name, x in _deltas(tensors, group).items() if isinstance(x, LowRank)}


def _changes(tensors: Mapping[str, Tensor], round: int, last_merge: Deltas) -> dict[int, Change]:
    """The inverse of `_named_changes`; earlier versions kept what the last round has merged."""
    kept = tensors[KEPT_ROUNDS].tolist() if KEPT_ROUNDS in tensors else [round] if round else []
    return {
        number: Change(
            last_merge if number == round else _deltas(tensors, f"merges/{number}"),
            _increments(tensors, number),
        )
        for number in kept
    }


def _increments(tensors: Mapping[str, Tensor], number: int) -> dict[str, Increment]:
    """Module -> its increment in a round."""
    modules: dict[str, Tensors] = {}
    for key, value in _group(tensors, f"increments/{number}").items():
        name, _, part = key.rpartition("/")
        modules.setdefault(name, {})[part] = value
    return {
        name: Increment(LowRank(x["A"], x["B"]), x["weights"], x.get("turn"))
        for name, x in modules.items()
    }


def _group(tensors: Mapping[str, Tensor], group: str) -> Tensors:
    """The tensors of one group, without its name before theirs."""
    start = f"{group}/"
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
