"""The followed directions of a global update: what they hold, and what an increment computes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from fedlora.lowrank import Delta, Dense, LowRank, add, concat, prefix, to_dense, zeros
from fedlora.methods.tracking import (
    advanced,
    as_starts,
    basis_size,
    choose_turn,
    divided,
    known_part,
    leading_directions,
    none_like,
    turned,
    unchanged,
    with_images,
)
from fedlora.methods.values import Increment

F64 = torch.float64


def random(*shape: int, seed: int, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def learnt_from(leading: LowRank, used: int, rank: int, seed: int, scale: float = 0.3) -> LowRank:
    """What two clients learn that start from the first `used` directions and fresh ones."""
    m, n = leading.shape
    start = as_starts(prefix(leading, used))
    terms = []
    for client in range(2):
        a = scale * random(rank, n, seed=10 * seed + client) / n**0.5
        b = scale * random(m, rank, seed=10 * seed + client + 5) / m**0.5
        a[: start.rank] += start.A
        b[:, : start.rank] += start.B
        terms.append(LowRank(a, 0.5 * b))
    return concat([*terms, LowRank(start.A, -start.B)]) if start.rank else concat(terms)


def advance(
    whole: Delta, leading: LowRank, learnt: LowRank, size: int
) -> tuple[Delta, LowRank, Increment]:
    increment = Increment(*divided(learnt, leading), turn=None)
    after = advanced(whole, leading, increment)
    increment = replace(increment, turn=choose_turn(after, leading, increment, size))
    return after, turned(after, leading, increment), increment


@pytest.mark.parametrize(
    ("wanted", "shape", "size"),
    [(0, (9, 9), 0), (1, (99, 99), 9), (48, (4096, 4096), 72), (48, (60, 4096), 60)],
)
def test_half_as_many_more_are_followed_as_are_used(
    wanted: int, shape: tuple[int, int], size: int
) -> None:
    assert basis_size(wanted, shape) == size


@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (12, 200)])
def test_over_twenty_rounds_the_basis_holds_what_the_leading_directions_hold(
    shape: tuple[int, int],
) -> None:
    used, size = 6, basis_size(6, shape)
    whole: Delta = zeros(shape)
    leading = zeros(shape)
    total = torch.zeros(shape, dtype=F64)
    forms = set()
    for number in range(20):
        learnt = learnt_from(leading, used, 8, number)
        total += to_dense(learnt)
        whole, leading, _ = advance(whole, leading, learnt, size)
        forms.add(type(whole))
        # S is the sum of what was learnt, whatever its leading directions are taken to be.
        torch.testing.assert_close(to_dense(whole), total, rtol=0, atol=1e-12)
        rows = leading.A[:used]
        torch.testing.assert_close(rows @ rows.T, torch.eye(used, dtype=F64), rtol=0, atol=1e-6)
        torch.testing.assert_close(total @ leading.A.T, leading.B, rtol=0, atol=1e-10)
        best = torch.linalg.svdvals(total)[:used].norm()
        assert float((total @ rows.T).norm()) >= 0.99 * float(best)
    assert Dense in forms
    assert leading.rank == size


def test_a_basis_of_all_directions_is_the_decomposition() -> None:
    shape = (6, 40)
    whole: Delta = zeros(shape)
    leading = zeros(shape)
    for number in range(4):
        learnt = learnt_from(leading, 2, 2, number)
        whole, leading, _ = advance(whole, leading, learnt, basis_size(2, shape))
        _, values, rows = torch.linalg.svd(to_dense(whole), full_matrices=False)
        found = leading.B.norm(dim=0)
        torch.testing.assert_close(found, values[: leading.rank], rtol=1e-9, atol=1e-9)
        cosines = (leading.A @ rows[: leading.rank].T).abs().diagonal()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-6)


def test_starts_are_known_by_their_rows_and_are_not_appended() -> None:
    leading = with_images(LowRank(random(9, 30, seed=1), random(20, 9, seed=2)), orthonormal(5, 30))
    learnt = learnt_from(leading, 3, 4, 7)
    stack, weights = divided(learnt, leading)
    assert (stack.rank, len(weights)) == (8, 3)
    torch.testing.assert_close(weights, -torch.ones(3, dtype=F64), rtol=1e-12, atol=0)
    both = to_dense(stack) + to_dense(known_part(weights, leading))
    torch.testing.assert_close(both, to_dense(learnt), rtol=0, atol=1e-12)
    assert all(x.is_contiguous() for x in (stack.A, stack.B))


def orthonormal(rank: int, n: int) -> torch.Tensor:
    return torch.linalg.qr(random(n, rank, seed=rank)).Q.T.contiguous()


def test_a_direction_whose_b_alone_was_trained_stays_in_the_stack() -> None:
    leading = with_images(LowRank(random(9, 30, seed=1), random(20, 9, seed=2)), orthonormal(5, 30))
    known = as_starts(leading)
    trained = LowRank(known.A[:2], torch.stack([known.B[:, 0] * 0.25, random(20, seed=4)], dim=1))
    stack, weights = divided(trained, leading)
    assert torch.equal(stack.A, known.A[1:2])
    torch.testing.assert_close(weights, torch.tensor([0.25], dtype=F64))
    # A direction that is followed and holds nothing is none to take weight from.
    empty = LowRank(leading.A, torch.zeros_like(leading.B))
    assert divided(trained, empty)[0].rank == 2


@pytest.mark.parametrize(("dense", "dtype"), [*product([False, True], [torch.float32, F64])])
def test_an_increment_computes_the_same_bits_again(dense: bool, dtype: torch.dtype) -> None:
    whole: Delta = LowRank(random(9, 50, seed=1, dtype=dtype), random(40, 9, seed=2, dtype=dtype))
    whole = Dense(to_dense(whole)) if dense else whole
    leading = leading_directions(whole, 5)
    learnt = learnt_from(leading, 3, 4, 7)
    learnt = LowRank(learnt.A.to(dtype), learnt.B.to(dtype))
    after, turned_to, increment = advance(whole, leading, learnt, 5)
    again = advanced(whole, leading, increment)
    assert same_bits(again, after)
    assert same_bits(turned(again, leading, increment), turned_to)
    expected = to_dense(add([whole, learnt])).to(dtype)
    torch.testing.assert_close(to_dense(after), expected, rtol=0, atol=1e-5)


def same_bits(one: Delta, other: Delta) -> bool:
    return vars(one).keys() == vars(other).keys() and all(
        torch.equal(x, vars(other)[name]) for name, x in vars(one).items()
    )


def test_directions_that_were_unlearnt_are_followed_no_longer() -> None:
    """What is left of them is rounding, and a start from it could not be trained."""
    whole = LowRank(random(3, 30, seed=1), random(20, 3, seed=2))
    leading = leading_directions(LowRank(orthonormal(3, 30), whole.B), 3)
    learnt = as_starts(leading)
    after, left, _ = advance(
        LowRank(orthonormal(3, 30), whole.B), leading, LowRank(learnt.A, -learnt.B), 3
    )
    assert float(to_dense(after).norm()) < 1e-12
    assert left.rank == 0


def test_a_round_that_changes_nothing_has_an_increment_of_nothing() -> None:
    leading = LowRank(orthonormal(3, 30), random(20, 3, seed=2))
    nothing = unchanged(leading)
    assert (nothing.nbytes, nothing.tensors) == (0, {})
    assert turned(leading, leading, nothing) is leading
    assert same_bits(advanced(leading, leading, nothing), leading)
    assert none_like(Dense(torch.ones(4, 3, dtype=F64))).shape == (4, 3)
