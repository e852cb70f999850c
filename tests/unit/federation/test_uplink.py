"""What a client sends in fewer bits, and that what is lost in one round comes in later ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.federation.compression import Compression, packed_bytes
from fedlora.federation.exchange import Agreement
from fedlora.federation.messages import ClientState, ClientUpdate
from fedlora.federation.uplink import ERROR, compressed
from fedlora.lowrank import LowRank, to_dense
from fedlora.methods import METHODS
from fedlora.methods.values import Start

M, N, R = 24, 40, 4


def agreed(method: str, compression: Compression = "int8") -> Agreement:
    rule = METHODS[method]
    return Agreement(rule, rule.options(), {"m": (M, N)}, 0, compression)


def drawn(seed: int, rank: int = R) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(rank, N, generator=draw) / N**0.5, torch.randn(M, rank, generator=draw)
    )


def update_of(x: LowRank, sends: str = "AB") -> ClientUpdate:
    a = x.A if "A" in sends else torch.zeros_like(x.A)
    b = x.B if "B" in sends else torch.zeros_like(x.B)
    return ClientUpdate(0, 1, {"m": LowRank(a, b)}, 5, sends=sends, metrics={"loss": 1.0})


START = Start({"m": LowRank(torch.zeros(R, N), torch.zeros(M, R))})


def wide(x: Any) -> Tensor:
    return to_dense(x).double()


def play(
    method: str, updates: list[LowRank], *, feedback: bool, sends: str = "AB"
) -> tuple[list[LowRank], dict[str, Tensor]]:
    """What the server reads of a client's updates, and what the client keeps in the end."""
    state, read = ClientState(), []
    for x in updates:
        sent = compressed(update_of(x, sends), START, state, agreed(method), feedback=feedback)
        state = ClientState(sent.lost)
        read.append(sent.update.adapter["m"])
    return read, dict(state.factors)


def missing(updates: list[LowRank], read: list[LowRank]) -> float:
    """How much of the sum of all updates did not come, in float64 of whole matrices."""
    total = sum(wide(x) for x in updates)
    assert isinstance(total, Tensor)
    return float((total - sum(wide(x) for x in read)).norm() / total.norm())


def test_what_is_sent_and_what_is_lost_add_up_to_the_update() -> None:
    x = drawn(1)
    sent = compressed(update_of(x), START, None, agreed("exact"))
    read, lost = sent.update.adapter["m"], sent.lost
    rest = wide(x) - wide(read)
    kept = lost["lost/B/m"].double() @ lost["lost/A/m"].double()
    left, values, right = torch.linalg.svd(rest)
    oracle = (left[:, :R] * values[:R]) @ right[:R]
    assert (kept - oracle).norm() <= 1e-4 * rest.norm()
    error = sent.update.metrics[ERROR]
    assert error == pytest.approx(float(rest.norm() / wide(x).norm()), rel=1e-3)
    assert sent.update.metrics["loss"] == 1.0
    assert 0 < error < 0.02
    assert packed_bytes(sent.update.tensors, "int8") == R * (M + N) + 4 * 2 * R


def test_the_same_update_again_and_again_comes_whole() -> None:
    """A client that learns the same in every round: what is lost does not add up."""
    updates = [drawn(1)] * 12
    on, _ = play("exact", updates, feedback=True)
    off, kept = play("exact", updates, feedback=False)
    assert not kept
    assert missing(updates, on) < 0.25 * missing(updates, off)


@pytest.mark.parametrize("sends", ["AB", "A", "B"])
def test_factors_that_are_averaged_make_up_for_themselves(sends: str) -> None:
    """Number by number: the sum of what came is that of what was sent, but for the last rest."""
    updates = [drawn(1)] * 10
    on, kept = play("fedit", updates, feedback=True, sends=sends)
    off, _ = play("fedit", updates, feedback=False, sends=sends)
    for factor in sends:
        total = sum(getattr(x, factor).double() for x in updates)
        came, plain = (sum(getattr(x, factor).double() for x in of) for of in (on, off))
        assert torch.allclose(total - came, kept[f"lost/{factor}/m"].double(), atol=1e-5)
        assert (total - came).norm() < 0.2 * (total - plain).norm()
    assert {name.split("/")[1] for name in kept} == set(sends)


def test_a_rule_that_trains_factors_in_turn_keeps_the_rest_of_both() -> None:
    state = ClientState()
    for number, sends in enumerate(("B", "A", "B")):
        x = update_of(drawn(number), sends)
        sent = compressed(x, START, state, agreed("rolora"))
        state = ClientState(sent.lost)
    assert set(state.factors) == {"lost/A/m", "lost/B/m"}


@pytest.mark.parametrize("method", ["fedsvd", "raflora"])
def test_rules_whose_directions_change_keep_nothing(method: str) -> None:
    sent = compressed(update_of(drawn(1)), START, None, agreed(method))
    assert not sent.lost
    assert sent.update.metrics[ERROR] > 0


def test_a_client_that_has_pruned_keeps_what_it_still_has() -> None:
    first = compressed(update_of(drawn(1)), START, None, agreed("hetlora"))
    smaller = compressed(update_of(drawn(2, 2)), START, ClientState(first.lost), agreed("hetlora"))
    assert smaller.lost["lost/A/m"].shape == (2, N)
    assert smaller.lost["lost/B/m"].shape == (M, 2)


def test_without_compression_the_update_itself_is_sent() -> None:
    update = update_of(drawn(1))
    sent = compressed(update, START, None, agreed("exact", "none"))
    assert sent.update is update
    assert not sent.lost


def test_a_client_that_has_learnt_nothing() -> None:
    zero = LowRank(drawn(1).A, torch.zeros(M, R))
    sent = compressed(update_of(zero), START, None, agreed("exact"))
    assert sent.update.metrics[ERROR] == 0.0
    assert torch.equal(sent.update.adapter["m"].B, zero.B)
