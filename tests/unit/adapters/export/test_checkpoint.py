"""Checkpoints: read and written tensor by tensor, in any number of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedlora.adapters.export.checkpoint import (
    INDEX,
    TensorInfo,
    open_checkpoint,
    read_size,
    shards_of,
    tensors_of,
    write_shards,
)
from fedlora.errors import InputError
from fedlora.model.sources import Source

RNG = torch.Generator().manual_seed(0)
TENSORS = {
    "b": torch.randn(4, 3, generator=RNG),
    "a": torch.randn(5, generator=RNG).to(torch.bfloat16),
    "half": torch.randn(2, 2, generator=RNG).half(),
    "wide": torch.randn(3, generator=RNG).double(),
    "steps": torch.arange(7),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


def infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {key: TensorInfo(tuple(t.shape), t.dtype) for key, t in tensors.items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (60, 4), (1, 8)])
def test_shards_are_what_safetensors_reads(tmp_path: Path, limit: int, files: int) -> None:
    paths = write_shards(tmp_path, infos(TENSORS), TENSORS.__getitem__, limit)
    assert len(paths) == files
    found = {key: value for path in paths for key, value in load_file(path).items()}
    same(found, TENSORS)
    checkpoint = open_checkpoint(Source(str(tmp_path), None, False))
    same({key: checkpoint.read(key) for key in checkpoint.files}, TENSORS)
    assert checkpoint.tensors == infos(TENSORS)
    if files > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
        assert index["weight_map"].keys() == TENSORS.keys()
        assert paths[0].name == f"model-00001-of-{files:05}.safetensors"


def test_a_large_tensor_gets_a_shard_of_its_own() -> None:
    assert shards_of({"a": 3, "b": 9, "c": 2, "d": 3}, 5) == [["a"], ["b"], ["c", "d"]]
    assert shards_of({}, 5) == []


def test_a_tensor_that_is_not_what_was_announced_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced as"):
        write_shards(tmp_path, infos({"a": TENSORS["a"]}), lambda key: TENSORS["b"], 100)


def test_older_checkpoints_are_read(tmp_path: Path) -> None:
    torch.save({**TENSORS, "version": 3}, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(Source(str(tmp_path), None, False))
    same({key: checkpoint.read(key) for key in checkpoint.files}, TENSORS)


def test_what_is_read_has_memory_of_its_own(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    checkpoint = tensors_of([tmp_path / "x.safetensors"])
    checkpoint.read("a").zero_()
    assert torch.equal(checkpoint.read("a"), torch.ones(3))


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no model.safetensors"):
        open_checkpoint(Source(str(tmp_path), None, False))
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(InputError, match=r"gone\.safetensors is missing"):
        open_checkpoint(Source(str(tmp_path), None, False))


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5KiB", 1536), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "5 parsecs", "-1GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="expected a size such as 5GB"):
        read_size(text)
