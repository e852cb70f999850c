"""Rounds tensors to fewer bits, and packs those that were rounded without losing anything.

These are two steps. *Rounding* loses something, and is done where a tensor comes into being: by the
client to what it has trained, by the server to what it hands out. Whoever goes on computing does so
with the rounded float32 numbers, so that both sides have the same. *Packing* happens when a message
becomes bytes, and unpacking gives the very same float32 numbers back. What was never rounded is
left as it is by packing.

    bf16    the upper half of a float32: 8 bits of precision
    int8    q * s with whole numbers q from -127 to 127, and one scale s for each row of A, column
            of B, or row of a matrix: `s = max |x| / 127`, rounded to 17 bits

127 s is then exact in float32, so the scale can be read off the rounded numbers again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from fedlora.lowrank import Delta, Dense, LowRank
from fedlora.methods.values import Prepared

Compression = Literal["none", "bf16", "int8"]
"""What numbers are rounded to on their way."""

BYTES: Mapping[Compression, int] = {"none": 4, "bf16": 2, "int8": 1}
"""Bytes of a rounded number in a message."""

_INT8, _SCALE, _BF16 = "#int8", "#scale", "#bf16"  # endings of the names of packed tensors
_CODES = 127
_SPARE_BITS = 7  # of a scale's 24, which the largest code takes
_TINY = 1e-30  # a row without a larger number is zero: its scale would lose bits


# --- rounding ---


def rounded(value: Tensor, compression: Compression, axis: int = 0) -> Tensor:
    """A float32 tensor with the numbers that are sent of it.

    Args:
        value: of any shape. One of another dtype, of more than two dimensions, or with NaN or Inf
            is given back as it is.
        compression: to what.
        axis: of a matrix: 0 has one scale for each row, 1 for each column.
    """
    if compression == "none" or value.dtype != torch.float32 or value.ndim not in (1, 2):
        return value
    if not value.isfinite().all():
        return value
    if compression == "bf16":
        return value.bfloat16().float()
    scale = _scale(value, axis)
    return _codes(value, scale) * scale


def rounded_update(x: Delta, compression: Compression, factors: str = "AB") -> Delta:
    """An update with the numbers that are sent of it: rows of A, columns of B, rows of a matrix.

    Args:
        x: the update.
        compression: to what.
        factors: those that are rounded; the others stay.
    """
    if compression == "none":
        return x
    if isinstance(x, Dense):
        return Dense(rounded(x.W, compression))
    a = rounded(x.A, compression) if "A" in factors else x.A
    return LowRank(a, rounded(x.B, compression, axis=1) if "B" in factors else x.B)


def rounded_prepared(sent: Prepared, compression: Compression, factors: str) -> Prepared:
    """What clients of a rank are sent, with the numbers that arrive.

    Args:
        sent: what is meant to be sent. Leading directions that are the adapter itself stay that.
        compression: to what.
        factors: those that ever travel; the others follow from the seed.
    """
    if compression == "none":
        return sent
    adapter = {name: rounded_update(x, compression, factors) for name, x in sent.adapter.items()}
    leading: dict[str, LowRank] = {}
    for name, x in sent.leading.items():
        ours = adapter.get(name) if x is sent.adapter.get(name) else None
        ours = ours or rounded_update(x, compression, factors)
        assert isinstance(ours, LowRank), "made of factors"
        leading[name] = ours
    return Prepared(adapter, leading, sent.error)


def _scale(value: Tensor, axis: int) -> Tensor:
    """The scale of every row `(r, 1)` or column `(1, r)` of a matrix, or of a vector `(1,)`."""
    along = 0 if value.ndim == 1 else 1 - axis
    if value.shape[along] == 0:
        largest = value.new_zeros([1 if i == along else size for i, size in enumerate(value.shape)])
    else:
        largest = value.abs().amax(dim=along, keepdim=True)
    half = 1 << (_SPARE_BITS - 1)
    bits = (largest / _CODES).view(torch.int32)
    scale = ((bits + half) >> _SPARE_BITS << _SPARE_BITS).view(torch.float32)
    return torch.where(largest > _TINY, scale, torch.zeros_like(scale))


def _codes(value: Tensor, scale: Tensor) -> Tensor:
    """The whole numbers `value / scale`, as float32; 0 where the scale is."""
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (value / divisor).round_().clamp_(-_CODES, _CODES).add_(0.0)  # int8 has no -0
    return torch.where(scale > 0, codes, torch.zeros_like(codes))


# --- packing ---


def packed(tensors: Mapping[str, Tensor], compression: Compression) -> dict[str, Tensor]:
    """The tensors in fewer bytes, in their order; `unpacked` gives the same numbers.

    A tensor that would lose anything is left as it is.
    """
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        out |= {name + ending: part for ending, part in _parts(value, compression).items()}
    return out


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `packed`.

    Raises:
        ValueError: parts that do not belong together.
    """
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(_INT8):
            name = name.removesuffix(_INT8)
            out[name] = _decoded(name, value, tensors.get(name + _SCALE))
        elif name.endswith(_SCALE):
            if name.removesuffix(_SCALE) + _INT8 not in tensors:
                raise ValueError(f"{name[:80]}: a scale of nothing")
        elif name.endswith(_BF16):
            if value.dtype != torch.bfloat16:
                raise ValueError(f"{name[:80]}: not in bfloat16")
            out[name.removesuffix(_BF16)] = value.float()
        else:
            out[name] = value
    return out


def packing_of(tensors: Mapping[str, Tensor]) -> Compression:
    """What packed tensors were rounded to; "none" where none of them is packed."""
    if any(name.endswith(_INT8) for name in tensors):
        return "int8"
    return "bf16" if any(name.endswith(_BF16) for name in tensors) else "none"


def packed_bytes(tensors: Mapping[str, Tensor], compression: Compression) -> int:
    """Bytes of the tensors in a message."""
    return sum(
        part.nbytes for value in tensors.values() for part in _parts(value, compression).values()
    )


def _parts(value: Tensor, compression: Compression) -> dict[str, Tensor]:
    """What travels of a tensor, by the ending of its name."""
    if compression == "none" or value.dtype != torch.float32 or not value.numel():
        return {"": value}
    if compression == "bf16":
        half = value.bfloat16()
        return {_BF16: half} if torch.equal(half.float(), value) else {"": value}
    if value.ndim not in (1, 2) or not value.isfinite().all():
        return {"": value}
    long = value.ndim == 2 and value.shape[0] > value.shape[1]
    for axis in (1, 0) if long else (0, 1):  # factors have few rows, or few columns
        scale = _scale(value, axis)
        codes = _codes(value, scale)
        if torch.equal((codes * scale).view(torch.int32), value.view(torch.int32)):
            return {_INT8: codes.to(torch.int8), _SCALE: scale}
    return {"": value}


def _decoded(name: str, codes: Tensor, scale: Tensor | None) -> Tensor:
    """The numbers that codes and their scales stand for.

    Raises:
        ValueError: they do not fit together.
    """
    rows = [1] if codes.ndim == 1 else [codes.shape[0], 1]
    columns = [1] if codes.ndim == 1 else [1, codes.shape[-1]]
    if (
        scale is None
        or codes.dtype != torch.int8
        or scale.dtype != torch.float32
        or codes.ndim not in (1, 2)
        or list(scale.shape) not in (rows, columns)
        or not scale.isfinite().all()
    ):
        raise ValueError(f"{name[:80]}: codes without their scales")
    return codes.float() * scale


def difference(meant: Delta, sent: Delta) -> Delta:
    """What rounding has lost of an update; its terms are small, so that nothing cancels out.

    `B A - B' A' = (B - B') A + B' (A - A')`.

    Args:
        meant: the update.
        sent: the same one in the same form, rounded.
    """
    if isinstance(meant, Dense):
        assert isinstance(sent, Dense), "of one form"
        return Dense(meant.W - sent.W)
    assert isinstance(sent, LowRank), "of one form"
    return LowRank(
        torch.cat([meant.A, meant.A - sent.A]), torch.cat([meant.B - sent.B, sent.B], dim=1)
    )
