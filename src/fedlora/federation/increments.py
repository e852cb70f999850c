"""Computes on both sides what the rounds' changes make of a global model, to the same bits.

The server sends a client only what has changed since the model it holds. Both sides apply the same
changes with the functions here, to tensors that lie in memory alike. On another processor the last
bits differ; a `sketch` of the model, which is as short as a few numbers, tells rounding from drift.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

from fedlora.federation.codec import as_new
from fedlora.federation.compression import BYTES, Compression
from fedlora.lowrank import Adapter, Delta, Deltas, Dense, LowRank, add_all, nbytes, wide
from fedlora.methods.tracking import advanced, none_like, turned
from fedlora.methods.values import Change, Increments, Prepared, ServerState
from fedlora.threads import one_thread

Sketch = Mapping[str, Sequence[float]]
"""Target module -> a few numbers that tell its update from another one."""

_NUMBERS = 4  # of a module's sketch
_SAME = 1e-4  # relative; rounding on two processors differs by some 1e-6


def laid_out(deltas: Deltas) -> Deltas:
    """These updates with every tensor as new; they themselves where all are: see `as_new`.

    Results depend in their last bits on how tensors lie in memory. The server computes from what it
    has and a client from a copy, and both must find the same.
    """

    def module(x: Delta) -> Delta:
        if isinstance(x, Dense):
            return x if (w := as_new(x.W)) is x.W else Dense(w)
        a, b = as_new(x.A), as_new(x.B)
        return x if a is x.A and b is x.B else LowRank(a, b)

    out = {name: module(x) for name, x in deltas.items()}
    return deltas if all(out[name] is x for name, x in deltas.items()) else out


def laid_out_to_send(sent: Prepared) -> Prepared:
    """What clients are sent, laid out as if it had gone through a message."""
    adapter = laid_out(sent.adapter)
    own = laid_out({n: x for n, x in sent.leading.items() if x is not sent.adapter.get(n)})
    leading = {name: own.get(name, adapter.get(name)) for name in sent.leading}
    return Prepared(adapter, cast(Adapter, leading), sent.error)


def merged(base_delta: Deltas, merge: Deltas) -> dict[str, Delta]:
    """The frozen side after a round that has merged something into it."""
    with one_thread():
        touched = {name: x for name, x in base_delta.items() if name in merge}
        return {**base_delta, **add_all([touched, merge])}


def appended(
    adapter: Deltas, leading: Adapter, increments: Increments
) -> tuple[dict[str, Delta], dict[str, LowRank]]:
    """The adapter and its leading directions after a round; see `methods.tracking`."""
    adapter, leading = dict(adapter), dict(leading)
    for name, increment in increments.items():
        if increment.turn is None:
            continue
        none = none_like(increment.stack)
        whole, directions = adapter.get(name, none), leading.get(name, none)
        adapter[name] = advanced(whole, directions, increment)
        leading[name] = turned(adapter[name], directions, increment)
    return adapter, leading


def changes_since(state: ServerState, held: int | None) -> list[tuple[int, Change]] | None:
    """What the rounds after `held` have changed, by round; None where not all of it is kept."""
    if held is None:
        return None
    rounds = range(held + 1, state.round + 1)
    if any(number not in state.changes for number in rounds):
        return None
    return [(number, state.changes[number]) for number in rounds]


def worth_keeping(state: ServerState, compression: Compression = "none") -> dict[int, Change]:
    """The changes by which a client may be brought up to date.

    Those since the oldest model that a client holds, as long as all of them together are smaller
    than the whole; the last round's in any case. A client holds the model it was last sent, which
    is that of the round before.

    Args:
        state: after a round.
        compression: what changes were rounded to. The whole was not, which is a sum of many.
    """
    share = BYTES[compression] / BYTES["none"]
    oldest = min(state.last_seen.values(), default=state.round)
    whole = nbytes(state.base_delta)
    if any(change.increments for change in state.changes.values()):
        whole += nbytes(state.adapter) + sum(x.A.nbytes for x in state.leading.values())
    kept, total = dict[int, Change](), 0.0
    for number in range(state.round, oldest - 1, -1):
        change = state.changes.get(number)
        if change is None:
            break
        total += change.nbytes * share
        if kept and total >= whole:
            break
        kept[number] = Change(change.merge, _smaller_than_whole(change.increments, state, share))
    return dict(sorted(kept.items()))


def _smaller_than_whole(increments: Increments, state: ServerState, share: float) -> Increments:
    """The increments of those modules that are not smaller themselves, with their basis."""
    return {
        name: x
        for name, x in increments.items()
        if x.turn is None
        or x.nbytes * share < state.adapter[name].nbytes + state.leading[name].A.nbytes
    }


def sketch(*parts: Deltas) -> dict[str, list[float]]:
    """Four numbers `Y dW z` for each module, with fixed random `Y (4, m)` and `z (n,)`.

    Args:
        parts: updates of the same model, which are added.
    """
    names = dict.fromkeys(name for part in parts for name in part)
    with one_thread():
        return {
            name: sum(_sketch(part[name]) for part in parts if name in part).tolist()  # type: ignore[union-attr]
            for name in names
        }


def agree(one: Sketch, other: Sketch) -> bool:
    """Whether two sketches are of one model but for rounding; a module without entry is zero."""
    zero = [0.0] * _NUMBERS
    for name in dict.fromkeys([*one, *other]):
        mine, theirs = (torch.tensor(x.get(name, zero), dtype=torch.float64) for x in (one, other))
        if mine.shape != theirs.shape:
            return False
        # Written so that NaN is a difference.
        if not (mine - theirs).norm() <= _SAME * torch.maximum(mine.norm(), theirs.norm()):
            return False
    return True


def _sketch(x: Delta) -> Tensor:
    m, n = x.shape
    left, right = _directions(_NUMBERS, m), _directions(1, n)[0]
    if isinstance(x, Dense):
        w = wide(x.W)
        column = w @ right.to(w)
    else:
        a = wide(x.A)
        column = wide(x.B) @ (a @ right.to(a))
    return left @ column.cpu().double()


@lru_cache(maxsize=16)
def _directions(count: int, size: int) -> Tensor:
    draw = torch.Generator().manual_seed(count)
    return torch.randn(count, size, generator=draw, dtype=torch.float64)
