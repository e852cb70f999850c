"""What the server hands out in fewer bits: the same for all, and what is lost comes later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.federation.compression import Compression, packed_bytes, rounded_update
from fedlora.federation.downlink import as_it_arrives, rounded_changes
from fedlora.federation.exchange import Agreement
from fedlora.federation.participants import Federation
from fedlora.lowrank import Delta, Dense, LowRank, concat, to_dense
from fedlora.methods import METHODS
from fedlora.methods.tracking import as_starts, divided
from fedlora.methods.values import Prepared

M, N = 30, 40


def federation(
    method: str = "flora", compression: Compression = "int8", *, feedback: bool = True
) -> Federation:
    rule = METHODS[method]
    agreement = Agreement(rule, rule.options(), {"m": (M, N)}, 0, compression)
    return Federation([4, 2], [1, 1], agreement, compression_feedback=feedback)


def drawn(seed: int, rank: int = 6) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, N, generator=draw), torch.randn(M, rank, generator=draw))


def wide(x: Delta) -> Tensor:
    return to_dense(x).double()


def missing(changes: list[Delta], how: Federation) -> float:
    """How much of the sum of all changes was not handed out."""
    unsent: dict[str, Delta] = {}
    total, came = torch.zeros(M, N).double(), torch.zeros(M, N).double()
    for x in changes:
        handed = rounded_changes({"m": x}, unsent, how)
        unsent = handed.unsent
        total, came = total + wide(x), came + wide(handed.deltas["m"])
    return float((total - came).norm() / total.norm())


@pytest.mark.parametrize("x", [drawn(0), Dense(wide(drawn(0)).float())])
def test_what_is_handed_out_and_what_is_left_add_up(x: Delta) -> None:
    handed = rounded_changes({"m": x}, {}, federation())
    rest = wide(x) - wide(handed.deltas["m"])
    assert handed.error == pytest.approx(float(rest.norm() / wide(x).norm()), rel=1e-3)
    kept = wide(handed.unsent["m"])
    if isinstance(x, Dense):
        assert (kept - rest).norm() <= 1e-5 * rest.norm()
        return
    left, values, right = torch.linalg.svd(rest)
    oracle = (left[:, :4] * values[:4]) @ right[:4]
    assert (kept - oracle).norm() <= 1e-3 * rest.norm()


def test_what_is_left_comes_with_later_rounds() -> None:
    x = Dense(wide(drawn(0)).float())
    changes: list[Delta] = [x] * 10
    on, off = (missing(changes, federation(feedback=way)) for way in (True, False))
    assert on < 0.2 * off


def test_a_stack_of_rounded_updates_loses_nothing_further() -> None:
    """Each direction has the scale that its client gave it."""
    parts = [rounded_update(drawn(seed, 3), "int8") for seed in range(3)]
    stack = concat([LowRank(x.A, x.B * 0.3) for x in parts if isinstance(x, LowRank)])
    handed = rounded_changes({"m": stack}, {}, federation())
    assert handed.error < 1e-5
    assert not handed.unsent


def test_directions_that_everybody_has_are_not_rounded() -> None:
    """`exact` says of them by how much of itself each changes."""
    rows = torch.linalg.qr(drawn(1, 3).A.T).Q.T.contiguous()
    known = LowRank(rows, drawn(2, 3).B)
    start = as_starts(known)
    learnt = concat([drawn(3, 4), LowRank(start.A, -0.5 * start.B)])
    out = rounded_changes({"m": learnt}, {}, federation("exact"), {"m": known})
    handed = out.deltas["m"]
    assert isinstance(handed, LowRank)
    stack, weights = divided(handed, known)
    assert torch.allclose(weights, torch.full((3,), -0.5), atol=1e-6)
    assert stack.rank == 4
    assert packed_bytes({"A": stack.A, "B": stack.B}, "int8") == 4 * (M + N) + 8 * 4
    assert (wide(handed) - wide(learnt)).norm() < 0.01 * wide(learnt).norm()


def test_without_compression_nothing_changes() -> None:
    changes: dict[str, Delta] = {"m": drawn(0)}
    handed = rounded_changes(changes, {}, federation(compression="none"))
    assert handed.deltas == changes
    assert (handed.unsent, handed.error) == ({}, 0.0)


@pytest.mark.parametrize(("method", "factors"), [("fedit", "AB"), ("ffa", "B"), ("fedsa", "A")])
def test_an_adapter_that_is_sent_anew_is_rounded_on_its_way(method: str, factors: str) -> None:
    x = drawn(0)
    sent, error = as_it_arrives(Prepared({"m": x}, {"m": x}), federation(method).agreement, 3)
    found: Any = sent.adapter["m"]
    assert 0 < error < 0.02
    for factor in "AB":
        same = torch.equal(getattr(found, factor), getattr(x, factor))
        assert same == (factor not in factors)


def test_an_adapter_that_clients_keep_stays_as_it_is() -> None:
    sent = Prepared({"m": drawn(0)}, {"m": drawn(0)})
    assert as_it_arrives(sent, federation("exact").agreement, 3) == (sent, 0.0)
