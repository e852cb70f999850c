"""Reads a base model's checkpoint tensor by tensor, and writes another one so.

Neither holds more than one tensor in memory: files are opened anew for each tensor, so that no
mapped page of a file outlives its use, and a shard is written as its tensors come.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from fedlora.errors import InputError
from fedlora.model.sources import Source, in_one_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_OLDER_INDEX, _OLDER = "pytorch_model.bin.index.json", "pytorch_model.bin"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of dtypes."""
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes it occupies."""
        return prod(self.shape) * self.dtype.itemsize


class Checkpoint:
    """A model's weights on the disk: safetensors or older files, in one piece or several.

    Args:
        files: key of a tensor -> the file it lies in.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = dict(files)
        self._older: tuple[Path, Mapping[str, Tensor]] | None = None
        self.tensors: dict[str, TensorInfo] = {}
        by_file: dict[Path, list[str]] = {}
        for key, file in self.files.items():
            by_file.setdefault(file, []).append(key)
        for file, keys in by_file.items():
            self.tensors |= {key: info for key, info in self._infos(file) if key in keys}
        if missing := [key for key in self.files if key not in self.tensors]:
            raise InputError(f"{self.files[missing[0]]}: the tensor {missing[0]} is missing")

    def read(self, key: str) -> Tensor:
        """One tensor, with memory of its own."""
        file = self.files[key]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                value: Tensor = opened.get_tensor(key)
                return value.clone()
        return self._mapped(file)[key].detach().clone()

    def _infos(self, file: Path) -> Iterator[tuple[str, TensorInfo]]:
        """Shape and dtype of every tensor of a file."""
        if file.suffix != ".safetensors":
            for key, value in self._mapped(file).items():
                yield key, TensorInfo(tuple(value.shape), value.dtype)
            return
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no mapping
                part = opened.get_slice(key)
                name = part.get_dtype()
                if name not in _BY_NAME:
                    raise InputError(
                        f"{file}: {key} is of {name}, which nothing can be added to; name the "
                        "unquantised model with --base"
                    )
                yield key, TensorInfo(tuple(part.get_shape()), _BY_NAME[name])

    def _mapped(self, file: Path) -> Mapping[str, Tensor]:
        """The tensors of an older file, mapped from the disk; one such file at a time."""
        if self._older is None or self._older[0] != file:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            self._older = file, {k: v for k, v in loaded.items() if isinstance(v, Tensor)}
        return self._older[1]


def open_checkpoint(source: Source) -> Checkpoint:
    """The weights of a base model, of a directory or the hub.

    Raises:
        InputError: there are none, or they cannot be fetched.
    """
    with in_one_line(f"{source.name}: its weights cannot be read", source.name):
        for index, single in ((INDEX, SINGLE), (_OLDER_INDEX, _OLDER)):
            if (listed := _file(source, index)) is not None:
                weight_map = json.loads(listed.read_text())["weight_map"]
                parts = {name: _file(source, name) for name in sorted(set(weight_map.values()))}
                absent = [name for name, path in parts.items() if path is None]
                if absent:
                    raise InputError(f"{source.name}: {absent[0]} is missing; download it again")
                return Checkpoint({k: path for k, n in weight_map.items() if (path := parts[n])})
            if (file := _file(source, single)) is not None:
                return Checkpoint(dict.fromkeys(_keys(file), file))
    raise InputError(f"{source.name}: holds no {SINGLE}, no {INDEX} and no {_OLDER}")


def _file(source: Source, name: str) -> Path | None:
    """A file of the base, fetched if it is on the hub; None where there is none."""
    from transformers.utils.hub import cached_file

    found = cached_file(
        source.name,
        name,
        revision=source.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    return None if found is None else Path(found)


def _keys(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return [key for key, value in loaded.items() if isinstance(value, Tensor)]


# --- writing ---

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?$", re.IGNORECASE)


def read_size(text: str) -> int:
    """`5GB` -> 5,000,000,000 and `5GiB` -> 5 * 2^30, as transformers reads `max_shard_size`.

    Raises:
        InputError: it is no size.
    """
    match = _SIZE.match(text.strip())
    if match is None or not float(match[1]):
        raise InputError(f"--max_shard_size: {text!r}: expected a size such as 5GB or 500MB")
    step = 1024 if match[3] else 1000
    return int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))


def shards_of(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The keys by shard, in their order; a shard is at most `limit` bytes or a single tensor.

    Args:
        sizes: key -> bytes.
        limit: bytes of a shard.
    """
    shards: list[list[str]] = []
    filled = 0
    for key, size in sizes.items():
        if not shards or (filled and filled + size > limit):
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def write_shards(
    directory: Path,
    infos: Mapping[str, TensorInfo],
    make: Callable[[str], Tensor],
    max_shard_size: int,
) -> list[Path]:
    """Write a checkpoint of safetensors files, asking for each tensor as it is written.

    Args:
        directory: that is there.
        infos: key -> what the tensor will be, in the order to write them.
        make: key -> the tensor, of the shape and dtype announced.
        max_shard_size: bytes; a larger tensor gets a file of its own.

    Returns:
        The files of tensors; beside several of them an index is written.

    Raises:
        OSError: a file cannot be written.
        ValueError: a tensor is not what was announced.
    """
    shards = shards_of({key: info.nbytes for key, info in infos.items()}, max_shard_size)
    number = len(shards)
    names = [f"model-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1)]
    names = [SINGLE] if number == 1 else names
    for name, keys in zip(names, shards, strict=True):
        with (directory / name).open("wb") as file:
            _write_safetensors(file, {key: infos[key] for key in keys}, make)
    if number > 1:
        weight_map = {k: name for name, keys in zip(names, shards, strict=True) for k in keys}
        total = sum(info.nbytes for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [directory / name for name in names]


def _write_safetensors(
    file: BinaryIO, infos: Mapping[str, TensorInfo], make: Callable[[str], Tensor]
) -> None:
    """One file: the length of the header, the header as JSON, the tensors' bytes in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key, info in infos.items():
        end = offset + info.nbytes
        header[key] = {
            "dtype": _DTYPES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    file.write(len(text).to_bytes(8, "little") + text)
    for key, info in infos.items():
        value = make(key)
        if tuple(value.shape) != info.shape or value.dtype != info.dtype:
            raise ValueError(f"{key} is {value.dtype} {tuple(value.shape)}, announced as {info}")
        file.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def tensors_of(files: Sequence[Path]) -> Checkpoint:
    """The checkpoint that these files make."""
    return Checkpoint({key: file for file in files for key in _keys(file)})
