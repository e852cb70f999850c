"""How far the global model's change is from the clients' sum, against matrices in float64."""

from __future__ import annotations

import math

import pytest
import torch

from fedlora.federation.aggregation_error import MEASURED_RANK, Norms, measure_change
from fedlora.lowrank import Delta, Dense, LowRank, concat, scale
from fedlora.methods.tracking import known_part, with_images
from fedlora.methods.values import Change, Increment, ServerState
from support.adapters import random_lowrank
from support.simulated import matrix


def norms_of(old: Delta | None, new: Delta, wanted: Delta | None) -> Norms:
    """What is measured of one module `q` whose adapter is replaced."""
    before = ServerState(0, {} if old is None else {"q": old})
    aim = {} if wanted is None else {"q": wanted}
    return measure_change(before, ServerState(1, {"q": new}), aim).modules["q"]


def by_hand(old: Delta | None, new: Delta, wanted: Delta | None) -> Norms:
    """The same from matrices."""
    change = matrix(new) - (0 if old is None else matrix(old))
    aim = torch.zeros_like(change) if wanted is None else matrix(wanted)
    return Norms(float(change.norm()), float(aim.norm()), float((change - aim).norm()))


@pytest.mark.parametrize("dense", [False, True])
def test_factors_and_matrices_are_measured_exactly(dense: bool) -> None:
    old, new, wanted = (random_lowrank((9, 7), rank, rank) for rank in (2, 3, 4))
    updated: Delta = Dense(matrix(new).float()) if dense else new
    measured, exact = norms_of(old, updated, wanted), by_hand(old, updated, wanted)
    for value, by_matrices in zip(measured, exact, strict=True):
        assert value == pytest.approx(by_matrices, rel=1e-5)
    assert norms_of(None, new, None) == pytest.approx(by_hand(None, new, None), rel=1e-5)


def test_long_factors_are_estimated_within_ten_percent() -> None:
    old, new, wanted = (random_lowrank((300, 400), MEASURED_RANK // 2, seed) for seed in (1, 2, 3))
    measured, exact = norms_of(old, new, wanted), by_hand(old, new, wanted)
    for value, by_matrices in zip(measured, exact, strict=True):
        assert value == pytest.approx(by_matrices, rel=0.1)


def test_one_and_the_same_update_on_both_sides_is_no_change_at_all() -> None:
    x = random_lowrank((9, 7), 3, 1)
    assert norms_of(x, x, None) == (0.0, 0.0, 0.0)
    assert norms_of(None, x, x).missed == 0.0


def test_what_was_merged_counts_as_change() -> None:
    merge = random_lowrank((9, 7), 2, 5)
    before = ServerState(0, {})
    after = ServerState(1, {}, {"q": merge}, last_merge={"q": merge})
    total = measure_change(before, after, {"q": merge}).total
    assert total.size == pytest.approx(float(matrix(merge).norm()), rel=1e-5)
    assert total.missed == 0.0


def appended(after: Delta, stack: LowRank, weight: float) -> tuple[ServerState, ServerState]:
    """The states around a round that is said to have appended a stack, and moved one direction."""
    old = random_lowrank((9, 7), 3, 1)
    leading = with_images(old, torch.linalg.qr(random_lowrank((7, 7), 2, 2).A.T).Q.T)
    increment = Increment(stack, torch.tensor([weight]), torch.zeros(0, 4))
    return (
        ServerState(0, {"q": old}, leading={"q": leading}),
        ServerState(
            1, {"q": after}, leading={"q": leading}, changes={1: Change({}, {"q": increment})}
        ),
    )


def test_of_an_appended_update_what_was_appended_is_measured() -> None:
    stack, old = random_lowrank((9, 7), 2, 5), random_lowrank((9, 7), 3, 1)
    before, _ = appended(old, stack, -0.5)
    learnt = concat([stack, known_part(torch.tensor([-0.5]), before.leading["q"])])
    after = concat([old, learnt])
    measured = measure_change(*appended(after, stack, -0.5), {"q": learnt}).modules["q"]
    assert measured.size == pytest.approx(float(matrix(learnt).norm()), rel=1e-5)
    assert measured.missed <= 1e-5 * measured.size
    # The increment is not what was learnt.
    other = measure_change(*appended(after, stack, -0.4), {"q": learnt}).modules["q"]
    assert other.missed > 0.01 * other.size


@pytest.mark.parametrize("dense", [False, True])
def test_what_has_not_changed_by_its_increment_is_noticed(dense: bool) -> None:
    """The increment is what was learnt; but something else, or nothing, became of the update."""
    stack, old = random_lowrank((9, 7), 2, 5), random_lowrank((9, 7), 3, 1)
    for gone in (random_lowrank((9, 7), 1, 3), scale(stack, -1.0)):
        made = concat([old, stack, gone])
        after = Dense(matrix(made).float()) if dense else made
        measured = measure_change(*appended(after, stack, 0.0), {"q": stack}).modules["q"]
        assert measured.missed > 0.1 * float(matrix(gone).norm())


def test_norms_over_modules_are_those_of_their_squares() -> None:
    total = Norms.of_squares([Norms(9.0, 1.0, 0.0), Norms(16.0, 3.0, -1e-12)])
    assert total == (5.0, 2.0, 0.0)
    one, other = random_lowrank((4, 4), 1, 1), random_lowrank((4, 4), 1, 2)
    state = ServerState(1, {"a": one, "b": other})
    size = measure_change(ServerState(0, {}), state, {}).total.size
    both = math.hypot(float(matrix(one).norm()), float(matrix(other).norm()))
    assert size == pytest.approx(both, rel=1e-5)
