"""Writes the model a run ends with: the last round's or the best one's, as PEFT directories."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fedlora.adapters.saved_adapter import SavedAdapter, load_adapter, write_adapter
from fedlora.errors import CheckpointError
from fedlora.federation.exchange import global_delta
from fedlora.federation.messages import ClientState
from fedlora.lowrank import Deltas, add_all
from fedlora.methods.values import ServerState
from fedlora.model.base import BaseModel
from fedlora.runs.evaluation import own_adapter
from fedlora.runs.safe_writing import verify


@dataclass(frozen=True)
class FinalModel:
    """The global model a run ends with.

    Args:
        round: whose model it is.
        delta: all that is added to the base.
        dense: its parameters trained whole.
    """

    round: int
    delta: Deltas
    dense: Mapping[str, Tensor]


def model_of_state(state: ServerState) -> FinalModel:
    """The global model of a server's state."""
    return FinalModel(state.round, global_delta(state), state.dense)


def model_of_round(directory: Path, number: int) -> FinalModel:
    """The global model of a round that the run has saved.

    Raises:
        CheckpointError: the round is damaged; what to do.
    """
    saved = _saved_adapter(directory, number)
    return FinalModel(number, saved.deltas, saved.dense)


def _saved_adapter(directory: Path, number: int) -> SavedAdapter:
    path = directory / f"round-{number}"
    try:
        verify(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; it is the best round, which load_best_model_at_end needs. Remove all "
            f"round-* directories to train it again, then: fedlora run --resume {directory}"
        ) from None
    return load_adapter(path)


def write_global_model(target: Path, base: BaseModel, model: FinalModel, last_round: Path) -> None:
    """Write the adapter, and beside it the clients' models that the last round has saved.

    Args:
        target: the directory to fill.
        base: whose target modules the adapter has.
        model: what the run ends with.
        last_round: directory of the last round.
    """
    write_adapter(target, model.delta, base.targets, model.dense)
    for client_dir in sorted(last_round.glob("client-*")):
        shutil.copytree(client_dir, target / client_dir.name)
    base.tokenizer.save_pretrained(target)


def write_personal_models(
    target: Path,
    base: BaseModel,
    state: ServerState,
    client_states: Mapping[int, ClientState],
    num_clients: int,
    dense: Mapping[str, Tensor],
) -> None:
    """Write `client-K/` for every client of a rule that has no global model.

    Args:
        target: the directory to fill.
        base: whose target modules the adapters have.
        state: of the server.
        client_states: client number -> what outlives a round at the client.
        num_clients: of the run.
        dense: the parameters trained whole, which are common to all clients.
    """
    for client in range(num_clients):
        own = own_adapter(state, client_states.get(client, ClientState()))
        model = add_all([state.base_delta, own])
        write_adapter(target / f"client-{client}", model, base.targets, dense)
    base.tokenizer.save_pretrained(target)
