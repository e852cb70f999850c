"""Tensors in one buffer and back, to the bit, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fedlora.errors import FedloraError
from fedlora.federation.codec import DamagedError, as_new, pack, pack_file, unpack, unpack_file

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4, dtype=torch.float64),
}


def test_a_packet_is_a_safetensors_file_with_a_header(tmp_path: Path) -> None:
    data = pack(TENSORS, {"round": 3})
    length = int.from_bytes(data[:8], "little")
    manifest = json.loads(data[8 : 8 + length])
    assert manifest["b"] == {
        "dtype": "F32",
        "shape": [2, 3],
        "data_offsets": manifest["b"]["data_offsets"],
    }
    pack_file(tmp_path / "it", TENSORS, {"round": 3})
    assert (tmp_path / "it").read_bytes() == data
    for packet in (unpack(data), unpack_file(tmp_path / "it")):
        assert packet.header == {"round": 3}
        assert list(packet.tensors) == list(TENSORS)  # the order in which they were given
        assert all(torch.equal(packet.tensors[name], TENSORS[name]) for name in TENSORS)
        assert packet.tensors["a"].dtype == torch.bfloat16


def test_any_flipped_bit_is_found() -> None:
    data = pack(TENSORS, {"round": 3})
    for at in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 1
        with pytest.raises(DamagedError):
            unpack(bytes(damaged))
    with pytest.raises(DamagedError):
        unpack(data[:-1])


def test_a_plain_safetensors_file_is_no_packet(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="its header is damaged"):
        unpack(save({"a": torch.ones(1)}))
    (tmp_path / "it").write_bytes(save({"a": torch.ones(1)}))
    with pytest.raises(DamagedError, match=f"^{tmp_path}/it: "):
        unpack_file(tmp_path / "it")
    with pytest.raises(FedloraError, match="cannot be written"):
        pack_file(tmp_path / "absent" / "it", TENSORS, {})


def test_views_are_packed_as_what_they_show() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    views = {"column": whole[:, 1], "again": whole[:, 1], "turned": whole.T}
    unpacked = unpack(pack(views, {})).tensors
    assert all(torch.equal(unpacked[name], views[name]) for name in views)


def test_as_new_is_contiguous_and_aligned() -> None:
    turned = torch.arange(12.0).reshape(3, 4).T
    shifted = torch.arange(9.0)[1:]
    for value in (turned, shifted):
        new = as_new(value)
        assert torch.equal(new, value)
        assert new.is_contiguous()
        assert new.data_ptr() % 64 == 0
    assert as_new(new) is new
