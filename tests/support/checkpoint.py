"""Makes a state with something in every place, to be saved and read back."""

from __future__ import annotations

from pathlib import Path

import torch

from fedlora.lowrank import Dense, LowRank, prefix
from fedlora.methods.values import Change, Encoded, Increment, ServerState
from fedlora.model.targets import Targets
from fedlora.runs.state_file import state_to_tensors

TARGETS = Targets(
    {"b.up": (6, 4), "a.down": (4, 6)}, ["up", "down"], False, "tiny", modules_to_save=("head",)
)


def low(rank: int = 2) -> LowRank:
    return LowRank(torch.randn(rank, 4), torch.randn(6, rank))


def a_state(number: int = 1) -> ServerState:
    """A state with something in every place, some of it views and some of it shared."""
    torch.manual_seed(number)
    shared, whole = low(), low(4)
    increment = Increment(low(), torch.randn(1), torch.randn(2, 4))
    nothing = Increment(low(0), torch.randn(0), None)
    return ServerState(
        round=number,
        adapter={"b.up": prefix(whole, 2), "a.down": Dense(torch.randn(6, 4).T)},
        base_delta={"b.up": shared},
        dense={"head.weight": torch.randn(3, 5)},
        last_merge={"b.up": shared},
        last_seen={0: 1, 3: number},
        momentum=Encoded({"b.up/A": whole.A[:2]}, {"b.up": shared}),
        leading={"b.up": low()},
        changes={
            number - 1: Change({"b.up": low()}, {"b.up": nothing}),
            number: Change({"b.up": shared}, {"b.up": increment}),
        },
    )


def assert_same(one: ServerState, other: ServerState) -> None:
    assert (one.round, dict(one.last_seen)) == (other.round, dict(other.last_seen))
    left, right = state_to_tensors(one), state_to_tensors(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
