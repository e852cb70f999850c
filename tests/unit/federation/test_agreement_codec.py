"""What both sides agree on, and how tensors are packed for the wire and the spool."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.federation.codec import DamagedError, pack, pack_file, unpack, unpack_file
from fedlora.federation.exchange import Agreement
from fedlora.methods import METHODS
from support.simulated import SHAPES


def agreement(method: str = "exact", seed: int = 7, **options: Any) -> Agreement:
    rule = METHODS[method]
    return Agreement(rule, rule.options(**options), SHAPES, seed)


def test_the_same_agreement_has_the_same_digest() -> None:
    one = agreement(start_fraction=1.0, max_rank=8)
    assert one.digest == agreement(start_fraction=1, max_rank=8).digest
    assert one.digest == replace(one, shapes=dict(reversed(SHAPES.items()))).digest
    assert len(one.digest) == 64
    # Pinned: an update of the package must not turn away clients that have not been updated yet.
    shapes = {"attn": (12, 9), "gate": (3, 5), "mlp": (7, 20), "wide": (60, 60)}
    assert replace(agreement("fedit", 3), shapes=shapes).digest == (
        "ed6da4eb34a06b5f2f34223f030b5508ba830e5c4bb806f8aa0b72c1358e9818"
    )


def test_whatever_differs_changes_the_digest() -> None:
    one = agreement()
    others = [
        agreement(seed=8),
        agreement(start_fraction=0.5),
        agreement(max_rank=8),
        agreement("flora"),
        agreement("fedit"),
        replace(one, shapes={**SHAPES, "attn": (12, 10)}),
        replace(one, shapes={**SHAPES, "more": (2, 2)}),
        replace(one, shapes={"attn": (12, 9)}),
    ]
    digests = [one.digest, *(other.digest for other in others)]
    assert len(set(digests)) == len(digests)


DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def many() -> dict[str, Tensor]:
    """Every dtype; views, an empty tensor, a scalar, and two names of one tensor."""
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {f"z.{dtype}": whole.to(dtype) for dtype in DTYPES}
    tensors |= {"view": whole[1:3, ::2], "turned": whole.T, "none": torch.zeros(0, 3)}
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return tensors | {"a": whole, "b": whole, "scalar": torch.tensor(2.5), "special": special}


HEADER = {"run": "ärger", "round": 3, "list": [1, None, 2.5], "table": {"x": True}}


@pytest.mark.parametrize("through", ["bytes", "file"])
def test_what_is_packed_comes_back(through: str, tmp_path: Path) -> None:
    tensors = many()
    if through == "bytes":
        packet = unpack(pack(tensors, HEADER))
    else:
        pack_file(tmp_path / "x", tensors, HEADER)
        packet = unpack_file(tmp_path / "x")
    assert packet.header == HEADER
    assert list(packet.tensors) == list(tensors)
    for name, value in packet.tensors.items():
        wanted = tensors[name]
        assert (value.dtype, value.shape) == (wanted.dtype, wanted.shape)
        assert value.contiguous().view(-1).tolist() == wanted.reshape(-1).tolist() or name in (
            "special"
        )
        assert value.is_contiguous()
        assert value.data_ptr() % 64 == 0
    bits = [packet.tensors["special"].view(torch.int32), tensors["special"].view(torch.int32)]
    assert torch.equal(*bits)
    # A copy: writing to it changes nothing else.
    packet.tensors["a"].fill_(9.0)
    assert float(packet.tensors["b"][0, 1]) == float(tensors["a"][0, 1]) == 1.0


def test_a_file_holds_the_bytes_of_a_packet(tmp_path: Path) -> None:
    pack_file(tmp_path / "x", many(), HEADER)
    assert (tmp_path / "x").read_bytes() == pack(many(), HEADER)


def test_the_format_is_a_json_manifest_and_one_buffer() -> None:
    data = pack({"b": torch.ones(2, 3), "a": torch.zeros(4, dtype=torch.bfloat16)}, {"round": 1})
    length = int.from_bytes(data[:8], "little")
    manifest = json.loads(data[8 : 8 + length])
    assert json.loads(manifest.pop("__metadata__")["fedlora"])["header"] == {"round": 1}
    assert {n: (x["dtype"], x["shape"]) for n, x in manifest.items()} == {
        "a": ("BF16", [4]),
        "b": ("F32", [2, 3]),
    }
    assert len(data) == 8 + length + 4 * 2 + 6 * 4


@pytest.mark.parametrize("part", ["length", "manifest", "header", "buffer", "end"])
def test_one_changed_bit_is_noticed(part: str) -> None:
    data = bytearray(pack(many(), HEADER))
    length = int.from_bytes(data[:8], "little")
    places = {
        "length": range(8),
        "manifest": range(8, 8 + length),
        "header": [data.index(b"round")],
        "buffer": range(8 + length, len(data), 7),
        "end": [len(data) - 1],
    }[part]
    noticed = 0
    for place in places:
        for bit in (0, 6):
            damaged = bytearray(data)
            damaged[place] ^= 1 << bit
            try:
                packet = unpack(bytes(damaged))
            except DamagedError:
                noticed += 1
            else:  # white space at the end of the manifest says nothing
                assert (data[place], packet.header) == (ord(" "), HEADER)
    assert noticed


@pytest.mark.parametrize("length", [0, 7, 8, 50, -1])
def test_what_was_cut_short_is_refused(length: int, tmp_path: Path) -> None:
    data = pack(many(), HEADER)[:length]
    with pytest.raises(DamagedError):
        unpack(data)
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DamagedError, match="x: "):
        unpack_file(tmp_path / "x")


def test_a_safetensors_file_of_somebody_else_is_no_packet(tmp_path: Path) -> None:
    from safetensors.torch import save, save_file

    with pytest.raises(DamagedError, match="header"):
        unpack(save({"a": torch.ones(2)}))
    save_file({"a": torch.ones(2)}, tmp_path / "x")
    with pytest.raises(DamagedError, match="header"):
        unpack_file(tmp_path / "x")


def test_what_cannot_be_written_is_a_mistake_the_user_can_mend(tmp_path: Path) -> None:
    with pytest.raises((FedloraError, OSError), match="nowhere"):
        pack_file(tmp_path / "nowhere" / "x", many(), HEADER)
