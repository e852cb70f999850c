"""Adapter layers over a frozen weight, against plain linear algebra."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.lowrank import Delta, Dense, LowRank, to_dense
from fedlora.model.lora_layer import AdapterLayer
from support.models import give


def lowrank(m: int, n: int, rank: int, seed: int, size: float = 0.3) -> LowRank:
    """Normal factors of a fixed seed."""
    rng = torch.Generator().manual_seed(seed)
    return LowRank(
        size * torch.randn(rank, n, generator=rng), size * torch.randn(m, rank, generator=rng)
    )


def linear(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A layer from 6 to 4 features, with a bias where its kind has one."""
    torch.manual_seed(1)
    layer: nn.Module
    if kind == "conv1d":
        layer = Conv1D(4, 6)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    else:
        layer = nn.Linear(6, 4, bias=kind == "bias")
    return layer.to(dtype).requires_grad_(False)


def weight_of(layer: nn.Module) -> Tensor:
    """`W (m, n)` in float64."""
    w: Tensor = layer.weight.detach().double()  # type: ignore[union-attr,operator,assignment]
    return w.T if isinstance(layer, Conv1D) else w


def by_hand(layer: nn.Module, x: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """`(W + sum dW) x + bias` in float64."""
    y = x.double() @ (weight_of(layer) + sum(d.double() for d in deltas)).T
    bias = getattr(layer, "bias", None)
    return y if bias is None else y + bias.detach().double()


FROZEN: dict[str, list[Delta]] = {
    "none": [],
    "factors": [lowrank(4, 6, 1, 1)],
    "factors of several": [lowrank(4, 6, 1, 1), lowrank(4, 6, 2, 2)],
    "dense": [Dense(to_dense(lowrank(4, 6, 3, 3)))],
    "both": [lowrank(4, 6, 1, 1), Dense(to_dense(lowrank(4, 6, 3, 3)))],
    "rank 0": [lowrank(4, 6, 0, 1)],
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("kind", ["bias", "no bias", "conv1d"])
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_a_layer_is_the_sum_of_its_parts(
    kind: str, frozen: list[Delta], shape: tuple[int, ...]
) -> None:
    layer = AdapterLayer(linear(kind))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    trained = lowrank(4, 6, 2, 9)
    give(layer, frozen, trained, scale=0.5, dropout=0.0)
    wanted = by_hand(layer.base, x, [to_dense(d) for d in [*frozen, trained]])
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-6)
    give(layer, frozen, None, scale=1.0, dropout=0.0)
    wanted = by_hand(layer.base, x, [torch.zeros(4, 6), *(to_dense(d) for d in frozen)])
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-6)


def test_factors_of_small_rank_stay_factors_beside_half_precision() -> None:
    """A branch of factors, and one of a matrix: both paths of the forward pass."""
    wide = nn.Linear(40, 30, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)).bfloat16()
    frozen: list[Delta] = [lowrank(30, 40, 3, 1)]
    for part in (frozen[0], Dense(to_dense(frozen[0]))):
        layer = AdapterLayer(wide)
        give(layer, [part], None, scale=1.0, dropout=0.0)
        assert type(layer.branch) is type(part)
        assert layer.merged is None
        wanted = by_hand(wide, x, [to_dense(frozen[0])])
        torch.testing.assert_close(layer(x).double(), wanted, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("kind", ["no bias", "conv1d"])
def test_half_precision_does_not_round_small_updates_away(kind: str, dense: bool) -> None:
    """Beside weights of 1, bfloat16 knows no 1.001: what is merged there is lost."""
    base = linear(kind, torch.bfloat16)
    with torch.no_grad():
        base.weight.fill_(1.0)  # type: ignore[union-attr,operator]
        if kind == "conv1d":
            base.bias.zero_()  # type: ignore[union-attr,operator]
    small = LowRank(torch.eye(6)[:1], torch.full((4, 1), 1e-3))
    assert torch.equal(weight_of(base).bfloat16() + to_dense(small).bfloat16(), torch.ones(4, 6))
    x = torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.bfloat16)
    assert not base(x).any()  # the base's own answer cancels, so the update's is all there is
    layer = AdapterLayer(base)
    give(layer, [Dense(to_dense(small)) if dense else small], None, scale=1.0, dropout=0.0)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), torch.full((1, 4), 1e-3), rtol=4e-3, atol=0.0)
    give(layer, [], small, scale=0.125, dropout=0.0)
    torch.testing.assert_close(layer(x).float(), torch.full((1, 4), 1e-3), rtol=4e-3, atol=0.0)


def test_the_trained_factors_are_copies() -> None:
    trained = lowrank(4, 6, 2, 9)
    before = trained.A.clone(), trained.B.clone()
    for scale in (1.0, 0.5):
        layer = AdapterLayer(linear("bias"))
        give(layer, [], trained, scale=scale, dropout=0.0)
        assert layer.A is not None
        assert layer.B is not None
        with torch.no_grad():
            layer.A.add_(1.0)
            layer.B.add_(1.0)
        assert torch.equal(trained.A, before[0])
        assert torch.equal(trained.B, before[1])


def test_dropout_acts_on_the_input_of_the_trained_side_and_only_while_training() -> None:
    layer = AdapterLayer(linear("bias"))
    frozen, trained = lowrank(4, 6, 1, 1), lowrank(4, 6, 2, 9)
    give(layer, [frozen], trained, scale=2.0, dropout=0.5)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    layer.train()
    torch.manual_seed(7)
    dropped = torch.nn.functional.dropout(x, 0.5, True)
    torch.manual_seed(7)
    wanted = (
        by_hand(layer.base, x, [to_dense(frozen)]) + dropped.double() @ to_dense(trained).double().T
    )
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-6)
    layer.eval()
    whole = by_hand(layer.base, x, [to_dense(frozen), to_dense(trained)])
    torch.testing.assert_close(layer(x).double(), whole, rtol=1e-5, atol=1e-6)
