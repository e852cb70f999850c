"""Plays rounds and writes their states as a run does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedlora.federation.aggregators.mean import Mean
from fedlora.federation.exchange import Agreement
from fedlora.federation.messages import ClientState
from fedlora.federation.participants import Federation
from fedlora.federation.server import Server, initial_state
from fedlora.methods import METHODS
from fedlora.methods.values import ServerState
from fedlora.runs.saved_state import read_server_state, write_server_state
from fedlora.runs.state_file import settled
from support.simulated import play, ranks_for

# Held as factors up to rank 43 and 30; one turns into a matrix in the third round, one in the next.
SHAPES = {"up": (96, 80), "down": (60, 60)}


def states(method: str, rounds: int, **keys: Any) -> Iterator[ServerState]:
    """The settled states of a run's rounds; in round 5 nobody learns anything."""
    rule = METHODS[method]
    compression = keys.pop("compression", "none")
    agreement = Agreement(rule, rule.options(), SHAPES, 5, compression)
    ranks = ranks_for(rule)
    federation = Federation(ranks, [10 + 7 * k for k in range(len(ranks))], agreement, **keys)
    server, kept = Server(federation, initial_state(federation), Mean()), dict[int, ClientState]()
    for number in range(1, rounds + 1):
        if number == 5:
            server.plan()
            server.commit()
        else:
            play(server, number, torch.float32, kept=kept)
        server.state = settled(server.state)
        yield server.state


def save(path: Path, state: ServerState) -> Path:
    """Write a round as a run's directory does."""
    directory, before = path / str(state.round), path / str(state.round - 1)
    directory.mkdir()
    write_server_state(directory, state, before if before.exists() else None)
    return directory


def read(directory: Path, state: ServerState) -> ServerState:
    return read_server_state(directory, state.round, state.last_seen, state.ranks)
