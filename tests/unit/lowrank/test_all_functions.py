"""What holds of every function of the algebra of low-rank updates."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor

from fedlora.lowrank import (
    Delta,
    Dense,
    LowRank,
    add,
    add_all,
    drop_null_directions,
    inner,
    norm,
    refactor,
    scale,
    scale_all,
    subtract,
    to_dense,
    truncate,
)
from support.lowrank import TOLERANCE, assert_close, exactly, groups, law, random, size, tensors


def test_an_update_of_rank_zero_is_zero_everywhere() -> None:
    x = LowRank(torch.zeros(0, 4), torch.zeros(3, 0))
    y = LowRank(random(1, 4, seed=1), random(3, 1, seed=2))
    assert torch.equal(to_dense(x), torch.zeros(3, 4))
    assert norm(x) == inner(x, y) == inner(y, x) == 0.0
    assert inner(x, Dense(torch.ones(3, 4))) == 0.0
    for changed in (scale(x, 3.0), refactor(x), drop_null_directions(x), add([x, x])):
        assert changed.rank == 0
    assert torch.allclose(exactly(add([x, y])), exactly(y))
    assert torch.allclose(exactly(subtract(x, y)), -exactly(y))
    for kept, error in (truncate(x, rank=2), truncate(x, energy=0.9), truncate(x, energy=1.0)):
        assert (kept.rank, error) == (0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_any_arithmetic(dtype: torch.dtype) -> None:
    x = LowRank(random(2, 9, seed=1).to(dtype), random(7, 2, seed=2).to(dtype))
    d = Dense(random(7, 9, seed=3).to(dtype))
    made: list[tuple[Delta, Tensor]] = [
        (add([x, x]), 2 * exactly(x)),
        (add([x, d]), exactly(x) + exactly(d)),
        (add([d, x]), exactly(x) + exactly(d)),
        (add([d, d]), 2 * exactly(d)),
        (subtract(x, d), exactly(x) - exactly(d)),
        (scale(x, 1 / 3), exactly(x) / 3),
        (scale(d, 1 / 3), exactly(d) / 3),
        (refactor(x), exactly(x)),
        (refactor(d), exactly(d)),
        (drop_null_directions(x), exactly(x)),
        (Dense(to_dense(x)), exactly(x)),
        (truncate(x, rank=2)[0], exactly(x)),
    ]
    for got, wanted in made:
        assert {t.dtype for t in tensors([got])} == {torch.float32}
        assert_close(got, wanted, size(x, d), TOLERANCE[torch.float32])
    assert inner(x, d) == pytest.approx(float((exactly(x) * exactly(d)).sum()), abs=1e-12)
    assert norm(x) == pytest.approx(float(exactly(x).norm()), abs=1e-12)


@law
@given(groups(2, 2))
def test_no_function_changes_its_inputs(terms: list[Delta]) -> None:
    x, y = terms
    before = [t.clone() for t in tensors(terms)]
    calls: list[Callable[[], object]] = [
        lambda: add([x, y]),
        lambda: add([x, y, x]),
        lambda: subtract(x, y),
        lambda: scale(x, 2.0),
        lambda: inner(x, y),
        lambda: norm(x),
        lambda: to_dense(x),
        lambda: refactor(x),
        lambda: drop_null_directions(x),
        lambda: truncate(x, rank=1),
        lambda: truncate(x, energy=0.5),
        lambda: add_all([{"a": x}, {"a": y}]),
        lambda: scale_all({"a": x}, 2.0),
    ]
    for call in calls:
        call()
    assert all(torch.equal(t, b) for t, b in zip(tensors(terms), before, strict=True))
