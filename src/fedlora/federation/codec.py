"""Packs named tensors and a header into one buffer, and unpacks it again.

The format is that of safetensors: eight bytes that tell the length of a JSON text, the JSON text,
and one buffer. The text is a manifest (name -> dtype, shape, offsets into the buffer); `fedlora` in
its `__metadata__` holds the sender's header, the order of the tensors, and a SHA-256 over the
header, the manifest and all numbers. Every dtype of torch stays what it is, bfloat16 too, and
nothing that is unpacked is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from fedlora.errors import FedloraError

_ALIGNED = 64  # bytes
_KEY = "fedlora"  # of the metadata


class DamagedError(FedloraError):
    """A buffer or file that is not what was packed."""


@dataclass(frozen=True)
class Packet:
    """What was packed.

    Args:
        tensors: in the order in which they were given, on the CPU, laid out as new.
        header: what was said about them; anything that JSON can hold.
    """

    tensors: dict[str, Tensor]
    header: dict[str, Any]


def pack(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> bytes:
    """One buffer with all tensors and the header."""
    plain = _plain(tensors)
    return bytes(save(plain, _metadata(plain, header)))


def unpack(data: bytes) -> Packet:
    """The inverse of `pack`.

    Raises:
        DamagedError: it is cut short, or anything in it was changed.
    """
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise DamagedError(f"not a packet of tensors: {error}") from None
    return _checked(tensors, metadata)


def pack_file(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write what `pack` gives to a file, without holding it all in memory.

    Raises:
        FedloraError: it cannot be written.
    """
    plain = _plain(tensors)
    try:
        save_file(plain, path, _metadata(plain, header))
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise FedloraError(f"{path}: cannot be written: {error}") from None


def unpack_file(path: Path) -> Packet:
    """The inverse of `pack_file`.

    Raises:
        DamagedError: it is cut short, or anything in it was changed.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        return _checked(load_file(path), metadata)
    except (SafetensorError, DamagedError) as error:
        raise DamagedError(f"{path}: {error}") from None


def as_new(value: Tensor) -> Tensor:
    """The tensor laid out as if it were new: contiguous, and aligned as an allocation is.

    The last bits of a result depend on strides and alignment. What went through a buffer or a file
    must count like what did not.
    """
    contiguous = torch.empty(value.shape, device="meta").stride()
    if value.stride() == contiguous and value.data_ptr() % _ALIGNED == 0:
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=value.device).copy_(value)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, none sharing memory with another or with more."""
    plain: dict[str, Tensor] = {}
    seen = set[int]()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        if storage.nbytes() != value.nbytes or storage.data_ptr() in seen:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        plain[name] = value
    return plain


def _metadata(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> dict[str, str]:
    """One entry, because safetensors writes several in an order of chance."""
    said = {"header": header, "order": list(tensors), "sha256": _checksum(tensors, header)}
    return {_KEY: json.dumps(said, sort_keys=True)}


def _checked(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Packet:
    """The packet, where everything in it is as it was packed."""
    try:
        said = json.loads(metadata[_KEY])
        header, wanted = said["header"], said["sha256"]
        ordered = {name: tensors[name] for name in said["order"]}
    except (KeyError, ValueError, TypeError):
        raise DamagedError("not a packet of tensors: its header is damaged") from None
    if len(ordered) != len(tensors) or _checksum(ordered, header) != wanted:
        raise DamagedError("the checksum differs: it was damaged on its way")
    return Packet({name: as_new(value) for name, value in ordered.items()}, header)


def _checksum(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, value in tensors.items():
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
