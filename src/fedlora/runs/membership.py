"""Takes clients into a running federation, and out of it for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from fedlora.federation.participants import Federation
from fedlora.federation.server import Server
from fedlora.methods.values import ServerState
from fedlora.runs.engine import Joined, Left


def admit(server: Server, joined: Joined) -> None:
    """Let a client take part from the next round on.

    Its number is the next one, so that everybody else keeps theirs.
    """
    federation = server.federation
    assert joined.client == len(federation.ranks), "numbers are given one after the other"
    server.federation = replace(
        federation,
        ranks=[*federation.ranks, joined.rank],
        num_examples=[*federation.num_examples, joined.rows],
    )
    server.state = with_all_ranks(server.state, server.federation)


def dismiss(server: Server, left: Left) -> None:
    """Ask a client no more: one without rows takes no part."""
    federation = server.federation
    rows = list(federation.num_examples)
    rows[left.client] = 0
    server.federation = replace(federation, num_examples=rows)


def with_all_ranks(state: ServerState, federation: Federation) -> ServerState:
    """The state with the rank of every client, of those too who came after it was made."""
    return replace(state, ranks={**dict(enumerate(federation.ranks)), **state.ranks})


def as_line(change: Joined | Left, number: int) -> Mapping[str, Any]:
    """The change as a line of `metrics.jsonl` (`events.Join`, `events.Leave`).

    Args:
        change: who has joined or left.
        number: of the last round that is committed.
    """
    event = "join" if isinstance(change, Joined) else "leave"
    return {"event": event, "round": number, **asdict(change)}


def in_words(change: Joined | Left, number: int) -> str:
    """The change as a notice."""
    who = f"client {change.client} ({change.name})"
    if isinstance(change, Joined):
        return (
            f"{who} takes part from round {number + 1} on: rank {change.rank}, {change.rows} rows"
        )
    return f"{who} has left after round {number}: {change.reason}"
