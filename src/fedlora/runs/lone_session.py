"""Makes the session of a client that trains by itself, to compare with its federation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedlora.errors import InputError
from fedlora.methods import METHODS
from fedlora.runs.session import Session


def alone(session: Session, client: int, output_dir: Path) -> Session:
    """The session of one client that trains by itself: same rows, steps and rank, nobody to ask.

    Raises:
        InputError: it has no row to train on.
    """
    data, spec = session.data, session.federation
    if not data.clients[client].train:
        raise InputError(f"client {client} has no rows to train on by itself")
    rank, overrides = spec.ranks[client], session.config.client_overrides
    assert not isinstance(overrides, str)
    settings = (overrides or {}).get(client)
    config = session.config.model_copy(
        update={
            "method": "fedit",  # with one client: go on training the same adapter
            "method_options": {},
            "compression": "none",
            "num_clients": 1,
            "min_clients_per_round": None,
            "clients_needed_per_round": None,
            "client_ranks": [rank],
            "client_memory": None,
            "client_overrides": {0: settings} if settings else None,
            "output_dir": str(output_dir),
            "save_total_limit": 2,
        }
    )
    return replace(
        session,
        config=config,
        data=replace(data, clients=(data.clients[client],)),
        label_counts=session.label_counts.of(client) if session.label_counts else None,
        federation=replace(
            spec,
            agreement=replace(
                spec.agreement,
                rule=METHODS[config.method],
                options=config.rule_options(),
                compression=config.compression,
            ),
            ranks=[rank],
            num_examples=[spec.num_examples[client]],
            modules={0: spec.modules[client]} if client in spec.modules else {},
        ),
        lone=client,
        other_bases={0: session.other_bases[client]} if client in session.other_bases else {},
    )
