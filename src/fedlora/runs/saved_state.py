"""Writes the server's state after a round, as what the round has added where it can, and reads it.

What a rule keeps of all rounds (S of `exact`, what `flora` has merged) grows, and is not written
anew in every round. `round-N/state` holds

    server.safetensors      the whole state, now and then; in the rounds between all but what grows
    server-C.safetensors    in the rounds between: the whole state after round C, the last such one
    change-K.safetensors    and what every round K after it, up to N, has changed

The files of earlier rounds are hard links to those in `round-(N-1)/state`, or copies where the file
system knows no links. So every round's directory is whole by itself: it can be copied, removed and
verified without the others, and takes only the space of what is new. Reading applies the changes
with the functions by which the server and its clients apply them (`federation.increments`), to the
same bits on the same processor. A sketch of the outcome lies in `server.safetensors` and is
compared.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fedlora.adapters.peft_files import save_tensors
from fedlora.errors import CheckpointError
from fedlora.federation.increments import Sketch, agree, appended, merged, sketch
from fedlora.lowrank import Deltas, Dense
from fedlora.methods.values import Change, Increments, ServerState
from fedlora.runs.state_file import (
    KEPT_ROUNDS,
    Tensors,
    settled,
    state_from_copies,
    state_to_tensors,
)
from fedlora.threads import map_modules

_Value = TypeVar("_Value")

SERVER = "server.safetensors"
_EARLIER = re.compile(r"(server|change)-(\d+)\.safetensors")
_SKETCH = "sketch/"
_MOST_CHANGES = 10
"""After so many rounds the state is written whole again: reading applies every one of them."""


@dataclass(frozen=True)
class Chain:
    """What a round's state is rebuilt from: a whole state, and the changes of the rounds after it.

    Args:
        start: the round of the whole state.
        whole: its file.
        changes: round -> its file; every round after `start`, ascending.
    """

    start: int
    whole: Path
    changes: Mapping[int, Path]

    @property
    def links(self) -> dict[str, Path]:
        """What the files are called in the next round's directory."""
        changes = {_change_name(number): path for number, path in self.changes.items()}
        return {f"server-{self.start}.safetensors": self.whole, **changes}


def write_server_state(directory: Path, state: ServerState, before: Path | None) -> dict[str, Path]:
    """Write the state after a round, whole or as what has changed since the round before.

    Args:
        directory: of the round's state.
        state: after the round.
        before: directory of the state after the round before; None: there is none.

    Returns:
        Name -> the file in `before` that it is a link to, or a copy of.
    """
    chain = chain_in(before, state.round - 1) if before else None
    if chain is None or not _can_go_on(chain, state) or _is_long(chain):
        save_tensors(directory / SERVER, state_to_tensors(state))
        return {}
    for name, file in chain.links.items():
        _link(file, directory / name)
    change = state.changes[state.round]
    own = ServerState(state.round, {}, last_merge=change.merge, changes={state.round: change})
    save_tensors(directory / _change_name(state.round), state_to_tensors(own))
    tensors = state_to_tensors(_without_what_grows(state))
    tensors[KEPT_ROUNDS] = torch.tensor(sorted(state.changes))
    for name, numbers in sketch(_what_grows(state)).items():
        tensors[f"{_SKETCH}{name}"] = torch.tensor(numbers, dtype=torch.float64)
    save_tensors(directory / SERVER, tensors)
    return chain.links


def read_server_state(
    directory: Path, round: int, last_seen: Mapping[int, int], ranks: Mapping[int, int]
) -> ServerState:
    """The state after a round, laid out as a settled one (`state_file.settled`).

    Args:
        directory: of the round's state; its files are known to be what was written.
        round: its number.
        last_seen: as in the state.
        ranks: as in the state.

    Raises:
        CheckpointError: its changes do not come to the state that was saved.
    """
    tensors = load_file(directory / SERVER)
    state = state_from_copies(tensors, round, last_seen, ranks)
    chain = chain_in(directory, round)
    if chain is None:
        raise CheckpointError(f"{directory}: damaged (files of earlier rounds are missing)")
    if not chain.changes:
        return state
    whole = state_from_copies(load_file(chain.whole), chain.start, {}, {})
    changes = dict(whole.changes)
    for number, path in chain.changes.items():
        changes[number] = state_from_copies(load_file(path), number, {}, {}).changes[number]
    grown = _after(whole, [changes[number] for number in chain.changes])
    if changes[round].increments:
        state = replace(state, adapter=grown.adapter, leading=grown.leading)
    else:
        state = replace(state, base_delta=grown.base_delta)
    kept = {number: changes[number] for number in state.changes}
    state = settled(replace(state, last_merge=changes[round].merge, changes=kept))
    if not agree(sketch(_what_grows(state)), _sketch_in(tensors)):
        raise CheckpointError(f"{directory}: its changes do not come to the model that was saved")
    return state


def chain_in(directory: Path, round: int) -> Chain | None:
    """What the state after a round rests on; None where there is none, or a part is missing.

    Args:
        directory: of the round's state.
        round: its number.
    """
    if not (directory / SERVER).is_file():
        return None
    matches = [_EARLIER.fullmatch(path.name) for path in directory.iterdir()]
    named = [(x[1], int(x[2]), directory / x[0]) for x in matches if x]
    wholes = {number: path for kind, number, path in named if kind == "server"}
    changes = {number: path for kind, number, path in sorted(named) if kind == "change"}
    if not wholes and not changes:
        return Chain(round, directory / SERVER, {})
    start = max(wholes, default=round)
    if sorted(changes) != list(range(start + 1, round + 1)):
        return None
    return Chain(start, wholes[start], dict(sorted(changes.items())))


def _can_go_on(chain: Chain, state: ServerState) -> bool:
    """Whether what grows in a state is what a chain and the state's last change come to."""
    change = state.changes.get(state.round)
    if change is None or not _is_on_cpu(_what_grows(state)):
        return False  # on a GPU sums have other last bits than where they are read
    if not (change.increments or state.base_delta):
        return False  # nothing grows
    if change.increments and not (
        change.increments.keys() == state.adapter.keys() == state.leading.keys()
    ):
        return False  # a module can only be written whole
    names = {number: _names_in(path) for number, path in chain.changes.items()}
    of_whole = _names_in(chain.whole)
    followed = [any(name.startswith("increments/") for name in x) for x in names.values()]
    if any(x != bool(change.increments) for x in followed):
        return False
    if change.increments and _modules(of_whole, "adapter/") != _modules(of_whole, "leading/"):
        return False  # an earlier version wrote it: the directions are found anew
    return all(
        _names_of(number, x) == _names_of_saved(number, chain.start, names.get(number, of_whole))
        for number, x in state.changes.items()
        if number != state.round
    )


def _is_long(chain: Chain) -> bool:
    """Whether the next state is to be written whole: many changes, or as large as the whole."""
    size = sum(path.stat().st_size for path in chain.changes.values())
    return len(chain.changes) >= _MOST_CHANGES or size >= chain.whole.stat().st_size


def _what_grows(state: ServerState) -> Deltas:
    """The part of a global model that is the sum of all rounds."""
    change = state.changes[state.round]
    return state.adapter if change.increments else state.base_delta


def _without_what_grows(state: ServerState) -> ServerState:
    rest = replace(state, last_merge={}, changes={})
    if state.changes[state.round].increments:
        return replace(rest, adapter={}, leading={})
    return replace(rest, base_delta={})


def _after(whole: ServerState, changes: Sequence[Change]) -> ServerState:
    """What grows, after some more rounds; modules are worked on beside each other."""

    def module(name: str) -> ServerState:
        base_delta, leading = _only(name, whole.base_delta), _only(name, whole.leading)
        grown = ServerState(0, _only(name, whole.adapter), base_delta, leading=leading)
        for change in changes:
            grown = _after_one(grown, _only(name, change.merge), _only(name, change.increments))
        return grown

    learnt = [name for x in changes for name in (*x.merge, *x.increments)]
    names = dict.fromkeys([*whole.adapter, *whole.base_delta, *learnt])
    modules = map_modules(module, {name: name for name in names}).values()
    return ServerState(
        0,
        {name: x for state in modules for name, x in state.adapter.items()},
        {name: x for state in modules for name, x in state.base_delta.items()},
        leading={name: x for state in modules for name, x in state.leading.items()},
    )


def _after_one(state: ServerState, merge: Deltas, increments: Increments) -> ServerState:
    """What grows, after one more round, laid out as the server lays it out."""
    adapter, leading = appended(state.adapter, state.leading, increments)
    return settled(ServerState(0, adapter, merged(state.base_delta, merge), leading=leading))


def _only(name: str, group: Mapping[str, _Value]) -> dict[str, _Value]:
    """One module of a group, where it has it."""
    return {name: group[name]} if name in group else {}


def _names_of(number: int, change: Change) -> set[str]:
    """What the tensors of a round's change are called in the file of that round."""
    own = ServerState(number, {}, last_merge=change.merge, changes={number: change})
    return state_to_tensors(own).keys() - {KEPT_ROUNDS}


def _names_of_saved(number: int, start: int, names: set[str]) -> set[str]:
    """Those among the names in a file that belong to a round's change, as `_names_of` says them.

    Args:
        number: of the round.
        start: the round of the whole state: its file holds changes of rounds before it too.
        names: of all tensors in the file.
    """
    merge = f"merges/{number}/" if number < start else "last_merge/"
    return {
        f"last_merge/{name.removeprefix(merge)}" if name.startswith(merge) else name
        for name in names
        if name.startswith((merge, f"increments/{number}/"))
    }


def _names_in(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


def _modules(names: set[str], group: str) -> set[str]:
    """The modules that have tensors in a group."""
    return {x.removeprefix(group).rpartition("/")[0] for x in names if x.startswith(group)}


def _sketch_in(tensors: Tensors) -> Sketch:
    return {
        name.removeprefix(_SKETCH): value.tolist()
        for name, value in tensors.items()
        if name.startswith(_SKETCH)
    }


def _is_on_cpu(deltas: Deltas) -> bool:
    tensors = [x.W if isinstance(x, Dense) else x.B for x in deltas.values()]
    return all(value.device.type == "cpu" for value in tensors)


def _change_name(number: int) -> str:
    return f"change-{number}.safetensors"


def _link(file: Path, name: Path) -> None:
    """Give a file a second name, or copy it where the file system knows no such thing."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)
