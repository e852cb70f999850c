"""Follows the leading directions of a global update from round to round, at constant cost.

A global update S `(m, n)` is the sum of what all rounds have learnt. It is kept by appending and is
never decomposed. Its leading directions are followed instead: a basis V `(L, n)` of rows that hold
the most of S, and their images `S V^T`. What a round learnt is, in factors,

    dS = B_new A_new + S V^T diag(w) V

`B_new A_new` is the stack of what clients ended with, and w says by how much of its weight each
leading direction was taken off again, because clients started from it. So

    S' = S + dS          V' = orth(turn [V; A_new])

with a small matrix `turn` `(L', L + r)`, chosen by one sweep over S' (Rayleigh and Ritz): of all
combinations of the old basis and the strongest new rows, those that hold the most of S'. Whoever
has S and V computes S' and V' from `(A_new, B_new, w, turn)` alone, an `Increment`.

Every split of S is exact, so it costs nothing that the basis is approximate: over twenty rounds it
holds more than 99% of what the true leading directions hold (a test).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedlora import lowrank
from fedlora.lowrank import Delta, Dense, LowRank, cheaper_form, concat, prefix, wide
from fedlora.methods.values import Increment
from fedlora.threads import one_thread

FRESH_ROW = 3**-0.5
"""The norm of a row of A as LoRA initialises it: n numbers, uniform between -n^-0.5 and n^-0.5."""

_LEAST_SHARE = 1e-6
"""New rows that hold less than this share of the strongest one's square are left out."""
_LEAST_NEW = 32
"""At least so many new rows are looked at, however few directions are followed."""
_ROUNDING = 100
"""Machine epsilons within which two numbers count as one."""


def basis_size(wanted: int, shape: tuple[int, int]) -> int:
    """How many directions are followed where `wanted` are used: half as many more, at least 8.

    The spare ones are those that may come to lead. None where none are used; no more than fit.
    """
    return min(wanted + max(8, wanted // 2), *shape) if wanted else 0


def image(whole: Delta, rows: Tensor) -> Tensor:
    """`S V^T (m, j)` for rows V `(j, n)`."""
    if isinstance(whole, Dense):
        return wide(whole.W) @ rows.T
    return wide(whole.B) @ (wide(whole.A) @ rows.T)


def with_images(whole: Delta, rows: Tensor) -> LowRank:
    """The directions of S along rows V: `A = V`, `B = S V^T`."""
    return LowRank(rows, image(whole, rows))


def leading_directions(whole: Delta, size: int) -> LowRank:
    """The leading directions, `size` of them, of an S that was not followed so far: decomposed."""
    return with_images(whole, _copy(lowrank.leading(whole, size).A))


def as_starts(leading: LowRank) -> LowRank:
    """The leading directions with rows of A as long as fresh ones: the same `B A`.

    Starts are these directions, or a part of their weight. The rows of A are the same for clients
    of every rank, to the bit, so that subtracting a start adds no row to S.

    Args:
        leading: directions whose rows of A are orthonormal.
    """
    return LowRank(leading.A * FRESH_ROW, leading.B / FRESH_ROW)


def divided(learnt: LowRank, leading: LowRank) -> tuple[LowRank, Tensor]:
    """What a round learnt, as `B_new A_new` and the weights w of known directions.

    Starts share the rows of `as_starts(leading)`, so those of them that were subtracted are known
    by their rows, to the bit. One whose column is no multiple of the direction's own stays in the
    stack: a client has moved its B and not its A.

    Args:
        learnt: dS, as factors.
        leading: what starts were cut from.

    Returns:
        The stack, and w `(j,)` up to the last direction that has a weight.
    """
    known = as_starts(leading)
    places = {_ends(row): place for place, row in enumerate(known.A)}
    kept = list[int]()
    weights = learnt.B.new_zeros(known.rank)
    for row in range(learnt.rank):
        place = places.get(_ends(learnt.A[row]))
        weight = None
        if place is not None and torch.equal(learnt.A[row], known.A[place].to(learnt.A)):
            weight = _ratio(learnt.B[:, row], known.B[:, place])
        if place is None or weight is None:
            kept.append(row)
        else:
            weights[place] += weight
    last = int(weights.nonzero().max()) + 1 if bool(weights.any()) else 0
    stack = LowRank(_copy(learnt.A[kept]), _copy(learnt.B[:, kept]))
    return stack, weights[:last].clone()


def known_part(weights: Tensor, leading: LowRank) -> LowRank:
    """`S V^T diag(w) V`, what `weights` say of a round's change."""
    x = prefix(leading, len(weights))
    return LowRank(x.A, x.B * weights)


def advanced(whole: Delta, leading: LowRank, increment: Increment) -> Delta:
    """`S' = S + dS`: rows of A move within themselves, the stack is appended.

    The starts are S's own directions, so subtracting them adds none to S: with `S = B A` it is
    `S + S V^T diag(w) V = B (A + A V^T diag(w) V)`.

    Args:
        whole: S.
        leading: its leading directions.
        increment: of the round.
    """
    weights, stack = increment.weights, increment.stack
    dtype = torch.promote_types(_dtype(whole), stack.B.dtype)
    with one_thread():
        if isinstance(whole, Dense):
            learnt = concat([known_part(weights, leading), stack])
            return Dense(torch.addmm(whole.W.to(dtype), learnt.B.to(dtype), learnt.A.to(dtype)))
        if len(weights):
            a, rows = whole.A.to(dtype), leading.A[: len(weights)].to(dtype)
            whole = LowRank(torch.addmm(a, (a @ rows.T) * weights.to(dtype), rows), whole.B)
        if stack.rank == 0:
            return LowRank(whole.A.to(dtype), whole.B.to(dtype))
        return cheaper_form(concat([whole, stack]) if whole.rank else stack)


def choose_turn(whole: Delta, leading: LowRank, increment: Increment, size: int) -> Tensor:
    """The combinations `(L', L + r)` of `[V; A_new]` that hold the most of S'.

    Args:
        whole: S', after the round.
        leading: the directions followed so far.
        increment: of the round; its turn is what is asked for.
        size: how many directions to follow, at the most.

    Returns:
        At most `size` combinations, the strongest first, in the dtype of the stack; none of S'
        null directions is among them.
    """
    stack = increment.stack
    with one_thread():
        basis = leading.A.to(stack.A)
        rows = torch.cat([basis, stack.A])  # (L + r, n)
        new = _new_rows(basis.double(), stack, max(size, _LEAST_NEW))  # (k, L + r)
        learnt = concat([known_part(increment.weights, leading), stack])
        old_images = leading.B.to(stack.B) + image(learnt, basis)  # S' V^T, without S'
        images = torch.cat([old_images, image(whole, new.to(rows) @ rows)], dim=1)  # (m, L + k)
        core = torch.linalg.qr(images, mode="r").R.double()
        _, values, right = torch.linalg.svd(core, full_matrices=False)
        scale = max(_largest(values), _largest(leading.B.double().norm(dim=0)))
        used = values > scale * _ROUNDING * torch.finfo(rows.dtype).eps
        kept = torch.eye(len(basis), len(rows), dtype=new.dtype, device=new.device)
        turn: Tensor = right[used][:size] @ torch.cat([kept, new])
        return turn.to(rows)


def turned(whole: Delta, leading: LowRank, increment: Increment) -> LowRank:
    """The leading directions after a round: `V' = orth(turn [V; A_new])` and `S' V'^T`.

    Args:
        whole: S', after the round.
        leading: the directions before it.
        increment: of the round; one without a turn leaves them as they are.
    """
    if increment.turn is None:
        return leading
    with one_thread():
        rows = increment.turn @ torch.cat([leading.A.to(increment.stack.A), increment.stack.A])
        # One step of Newton and Schulz: the rows are orthonormal but for the rounding of `turn`.
        rows = 1.5 * rows - 0.5 * ((rows @ rows.T) @ rows)
        return with_images(whole, rows)


def none_like(x: Delta) -> LowRank:
    """Zero in the shape, dtype and place of another update, as factors of no rank."""
    like = x.W if isinstance(x, Dense) else x.B
    m, n = x.shape
    return LowRank(like.new_zeros(0, n), like.new_zeros(m, 0))


def unchanged(leading: LowRank) -> Increment:
    """The increment of a round in which nothing was learnt."""
    return Increment(none_like(leading), leading.B.new_zeros(0), None)


def _new_rows(basis: Tensor, stack: LowRank, size: int) -> Tensor:
    """Orthonormal rows beyond the old basis, as combinations `(k, L + r)` of it and the new rows.

    They are the leading right singular directions of what the stack has beyond V. Everything but
    its two Gram matrices is of size r, in float64.

    Args:
        basis: V `(L, n)` in float64, orthonormal.
        stack: of rank r.
        size: how many, at the most.
    """
    new, left = stack.A.double(), stack.B.double()
    strength = left.norm(dim=0)  # (r,): rows count by it, and columns by their direction alone
    shared = new @ basis.T  # (r, L)
    inner = (new @ new.T - shared @ shared.T) * strength * strength[:, None]
    squares, turns = torch.linalg.eigh(inner)
    used = squares > _LEAST_SHARE * _largest(new.square().sum(dim=1) * strength.square())
    roots, turns = squares[used].sqrt(), turns[:, used]  # of the rows beyond V: (k,), (r, k)
    columns = (left / strength.clamp_min(torch.finfo(left.dtype).tiny)) @ turns * roots  # (m, k)
    order = torch.linalg.eigh(columns.T @ columns).eigenvectors.flip(1)[:, :size]
    mixed = (turns / roots @ order).T * strength  # (k, r)
    return torch.cat([-(mixed @ shared), mixed], dim=1)


def _ratio(column: Tensor, direction: Tensor) -> Tensor | None:
    """The factor that makes `direction` `column`; None where none does, but for rounding."""
    square = direction.double().square().sum()
    if not square:
        return None
    ratio = (column.double() @ direction.double()) / square
    near = _ROUNDING * torch.finfo(column.dtype).eps * column.double().norm()
    missed = (column.double() - ratio * direction.double()).norm()
    return ratio.to(column) if missed <= near else None


def _dtype(x: Delta) -> torch.dtype:
    return wide(x.W if isinstance(x, Dense) else x.B).dtype


def _ends(row: Tensor) -> tuple[float, ...]:
    """The first and last numbers of a row, by which equal rows are looked for."""
    return tuple(torch.cat([row[:8], row[-8:]]).tolist())


def _largest(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0


def _copy(value: Tensor) -> Tensor:
    """The tensor, row after row in memory of its own: results depend on that in their last bits."""
    return value.clone(memory_format=torch.contiguous_format)
