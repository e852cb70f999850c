"""Numbers in fewer bits: how far they are from the given ones, and that packing loses nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlora.federation.compression import (
    Compression,
    difference,
    packed,
    packed_bytes,
    packing_of,
    rounded,
    rounded_prepared,
    rounded_update,
    unpacked,
)
from fedlora.lowrank import Dense, LowRank, to_dense
from fedlora.methods.values import Prepared

CODES = torch.zeros(2, 3, dtype=torch.int8)


def normal(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw) * torch.logspace(-6, 3, shape[-1])


def dense_oracle(value: Tensor, axis: int) -> Tensor:
    """The same grid, row by row in float64 and with the scale as it is."""
    rows = value.double() if axis == 0 else value.double().T
    out = [(row / (row.abs().max() / 127)).round() * (row.abs().max() / 127) for row in rows]
    grid = torch.stack(out)
    return grid if axis == 0 else grid.T


@pytest.mark.parametrize("axis", [0, 1])
def test_int8_is_the_nearest_of_255_steps_of_every_row(axis: int) -> None:
    value = normal(7, 40)
    found = rounded(value, "int8", axis)
    largest = value.abs().amax(dim=1 - axis, keepdim=True)
    assert ((found - value).abs() <= largest / 254 * (1 + 1e-4)).all()
    assert torch.allclose(found.double(), dense_oracle(value, axis), rtol=2e-5, atol=1e-12)


def test_bf16_keeps_eight_bits() -> None:
    value = normal(5, 9)
    found = rounded(value, "bf16")
    assert ((found - value).abs() <= value.abs() * 2**-8).all()
    assert not torch.equal(found, value)


@pytest.mark.parametrize("compression", ["bf16", "int8"])
@pytest.mark.parametrize("shape", [(3, 50), (50, 3), (4, 4), (1, 1), (6,), (0, 5), (5, 0)])
def test_packing_loses_no_bit_of_what_was_rounded(
    compression: Compression, shape: tuple[int, ...]
) -> None:
    """Whatever the axis: the reader sees it from the shape of the scales."""
    for axis in range(len(shape)):
        for seed in range(20):
            value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            once = rounded(value, compression, axis)
            assert torch.equal(rounded(once, compression, axis), once)
            parts = packed({"x": once}, compression)
            assert torch.equal(unpacked(parts)["x"], once)
            if once.numel():
                assert packing_of(parts) == compression
            assert packed_bytes({"x": once}, compression) == sum(p.nbytes for p in parts.values())


def test_rows_of_extreme_numbers() -> None:
    value = torch.tensor([[0.0, -0.0], [1e-38, -3e-39], [3e38, 1.0], [-5e-30, 2e-30]])
    once = rounded(value, "int8")
    assert torch.equal(once[:2], torch.zeros(2, 2))
    assert torch.equal(unpacked(packed({"x": once}, "int8"))["x"], once)
    bits = unpacked(packed({"x": once}, "int8"))["x"].view(torch.int32)
    assert torch.equal(bits, once.view(torch.int32))  # also the sign of zeros


@pytest.mark.parametrize("compression", ["bf16", "int8"])
def test_what_was_not_rounded_is_left_alone(compression: Compression) -> None:
    given = {
        "x": normal(3, 8),
        "nan": torch.tensor([[1.0, float("nan")]]),
        "w": torch.ones(2).double(),
    }
    parts = packed(given, compression)
    assert list(parts) == list(given)
    assert packing_of(parts) == "none"
    assert packed_bytes(given, compression) == sum(x.nbytes for x in given.values())
    for name, value in given.items():
        assert parts[name] is value
    assert rounded(given["nan"], compression) is given["nan"]
    assert rounded(given["w"], compression) is given["w"]


def test_none_rounds_nothing() -> None:
    x = LowRank(normal(2, 5), normal(6, 2))
    sent = Prepared({"m": x}, {"m": x})
    assert rounded(x.A, "none") is x.A
    assert rounded_update(x, "none") is x
    assert rounded_prepared(sent, "none", "AB") is sent


def test_directions_have_scales_of_their_own_so_that_a_cut_commutes() -> None:
    x = LowRank(normal(4, 30), normal(20, 4))
    whole = rounded_update(x, "int8")
    assert isinstance(whole, LowRank)
    cut = rounded_update(LowRank(x.A[:2], x.B[:, :2]), "int8")
    assert isinstance(cut, LowRank)
    assert torch.equal(cut.A, whole.A[:2])
    assert torch.equal(cut.B, whole.B[:, :2])


def test_only_factors_that_travel_are_rounded_and_what_is_one_stays_one() -> None:
    x = LowRank(normal(4, 30), normal(20, 4))
    out = rounded_prepared(Prepared({"m": x}, {"m": x}), "int8", "B")
    assert out.leading["m"] is out.adapter["m"]
    assert out.leading["m"].A is x.A
    assert not torch.equal(out.leading["m"].B, x.B)


def test_difference_is_what_was_lost() -> None:
    x, w = LowRank(normal(4, 30), normal(20, 4)), Dense(normal(6, 7))
    for meant in (x, w):
        sent = rounded_update(meant, "int8")
        oracle = to_dense(meant).double() - to_dense(sent).double()
        found = to_dense(difference(meant, sent)).double()
        assert (found - oracle).norm() <= 1e-4 * oracle.norm()


@pytest.mark.parametrize(
    "parts",
    [
        {"x#int8": CODES},
        {"x#scale": torch.ones(2, 1)},
        {"x#int8": torch.zeros(2, 3, dtype=torch.int8), "x#scale": torch.ones(3, 1)},
        {
            "x#int8": torch.zeros(2, 3, dtype=torch.int8),
            "x#scale": torch.full((2, 1), float("inf")),
        },
        {"x#int8": torch.zeros(2, 3), "x#scale": torch.ones(2, 1)},
        {"x#bf16": torch.zeros(2, 3)},
    ],
)
def test_parts_that_do_not_belong_together_are_refused(parts: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="x"):
        unpacked(parts)
