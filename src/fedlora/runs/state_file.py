"""Turns the server's and the clients' state into named tensors and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlora.federation.messages import ClientState
from fedlora.lowrank import Delta, Deltas, Dense, LowRank
from fedlora.methods.values import Encoded, ServerState

CLIENTS = "clients.safetensors"


def _flatten(prefix: str, deltas: Deltas, into: dict[str, Tensor]) -> None:
    for name, x in deltas.items():
        if isinstance(x, Dense):
            into[f"{prefix}/{name}/W"] = x.W.contiguous()
        else:
            into[f"{prefix}/{name}/A"] = x.A.contiguous()
            into[f"{prefix}/{name}/B"] = x.B.contiguous()


def _unflatten(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        group, _, rest = key.partition("/")
        if group == prefix:
            name, _, factor = rest.rpartition("/")
            found.setdefault(name, {})[factor] = value
    return {
        name: Dense(parts["W"]) if "W" in parts else LowRank(parts["A"], parts["B"])
        for name, parts in found.items()
    }


def state_to_tensors(state: ServerState) -> dict[str, Tensor]:
    """Every tensor of a server state under a name of its own, none sharing memory with another."""
    out: dict[str, Tensor] = {}
    _flatten("adapter", state.adapter, out)
    _flatten("base_delta", state.base_delta, out)
    _flatten("last_merge", state.last_merge, out)
    _flatten("momentum_products", state.momentum.products, out)
    out |= {f"momentum_factors/{k}": v.contiguous() for k, v in state.momentum.factors.items()}
    out |= {f"dense/{k}": v.contiguous() for k, v in state.dense.items()}
    seen = set[int]()
    for key, value in out.items():  # after a round, momentum and merge may be the same tensors
        where = value.untyped_storage().data_ptr()
        out[key] = value.clone() if where in seen else value
        seen.add(where)
    return out


def state_from_tensors(
    tensors: Mapping[str, Tensor],
    round: int,
    last_seen: Mapping[int, int],
    ranks: Mapping[int, int],
) -> ServerState:
    """The inverse of `state_to_tensors`."""

    def plain(group: str) -> dict[str, Tensor]:
        return {k[len(group) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{group}/")}

    return ServerState(
        round=round,
        adapter=_unflatten("adapter", tensors),
        base_delta=_unflatten("base_delta", tensors),
        dense=plain("dense"),
        last_merge=_unflatten("last_merge", tensors),
        last_seen=dict(last_seen),
        ranks=dict(ranks),
        momentum=Encoded(plain("momentum_factors"), _unflatten("momentum_products", tensors)),
    )


def settled(state: ServerState) -> ServerState:
    """The state as it is after saving and loading it: the same numbers, laid out the same way.

    Results depend in their last bits on strides, alignment and the order of sums. A run that goes
    on from the settled state after every round takes the same course as one resumed there.
    """
    return from_copies(state_to_tensors(state), state.round, state.last_seen, state.ranks)


def from_copies(
    tensors: Mapping[str, Tensor],
    round: int,
    last_seen: Mapping[int, int],
    ranks: Mapping[int, int],
) -> ServerState:
    return state_from_tensors(_copies(tensors), round, last_seen, ranks)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: tensors[k].clone(memory_format=torch.contiguous_format) for k in sorted(tensors)}


def clients_to_tensors(clients: Mapping[int, ClientState]) -> dict[str, Tensor]:
    """Every tensor of all clients' states as `client/module.B`."""
    return {f"{k}/{n}": t for k, state in sorted(clients.items()) for n, t in state.factors.items()}


def clients_from_tensors(tensors: Mapping[str, Tensor]) -> dict[int, ClientState]:
    """The inverse of `clients_to_tensors`."""
    out: dict[int, dict[str, Tensor]] = {}
    for key, value in _copies(tensors).items():
        client, _, name = key.partition("/")
        out.setdefault(int(client), {})[name] = value
    return {client: ClientState(factors) for client, factors in sorted(out.items())}
