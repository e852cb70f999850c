"""Messages as bytes: what comes back, the kept golden file, and everything that is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedlora.federation.codec import pack
from fedlora.federation.compression import packed, rounded
from fedlora.federation.envelope import (
    VERSION,
    Header,
    Limits,
    Message,
    RefusedMessageError,
    check_header,
    decode,
    encode,
)
from support.paths import REPOSITORY

GOLDEN = REPOSITORY / "tests" / "data" / "message-v1.bin"
HEADER = Header("0123456789abcdef", 3, 1, "train", "b" * 64, "a" * 64)


def message() -> Message:
    """What the golden file holds: every dtype that travels, an empty tensor and a nested body."""
    tensors = {
        "g0/model.layers.0.q_proj/A": torch.arange(6, dtype=torch.float32).reshape(2, 3) / 7,
        "g0/model.layers.0.q_proj/B": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
        "g1/head/value": torch.zeros(0, 4, dtype=torch.float64),
        "g2/rows/value": torch.tensor([-128, 127], dtype=torch.int8),
    }
    return Message(HEADER, {"clients": [{"client": 4, "loss": 0.1}], "groups": ["g0"]}, tensors)


GOLDEN_PACKED = REPOSITORY / "tests" / "data" / "message-v2-int8.bin"


def packed_message() -> Message:
    """A tensor on the grid of eight bits by rows, one by columns, and one on none."""
    rows = rounded(torch.arange(12, dtype=torch.float32).reshape(2, 6).sin(), "int8")
    columns = rounded(torch.arange(12, dtype=torch.float32).reshape(6, 2).cos(), "int8", axis=1)
    tensors = {"0/A/q": rows, "0/B/q": columns, "dense/score": torch.tensor([[0.1, 0.7]])}
    return Message(HEADER, {"clients": []}, tensors, "int8")


def test_what_was_rounded_travels_in_fewer_bytes_and_comes_back_bit_by_bit() -> None:
    sent = packed_message()
    assert encode(sent) == GOLDEN_PACKED.read_bytes()
    back = decode(GOLDEN_PACKED.read_bytes())
    assert (back.compression, list(back.tensors)) == ("int8", list(sent.tensors))
    for name, value in sent.tensors.items():
        assert torch.equal(back.tensors[name], value)
        assert back.tensors[name].dtype == torch.float32
    manifest, _ = said_of(encode(sent))
    assert json.loads(manifest["__metadata__"]["fedlora"])["header"]["version"] == VERSION
    assert manifest["0/A/q#int8"]["shape"] == [2, 6]
    assert manifest["0/B/q#scale"]["shape"] == [1, 2]


def test_where_nothing_is_packed_the_version_is_the_first() -> None:
    """So that an older fedlora reads it, and its bytes are those of a message without."""
    plain = message()
    assert encode(replace(plain, compression="int8")) == encode(plain)


@pytest.mark.parametrize("lost", ["0/A/q#int8", "0/A/q#scale"])
def test_codes_without_scales_are_refused(lost: str) -> None:
    parts = packed(packed_message().tensors, "int8")
    del parts[lost]
    header = {"version": VERSION, **HEADER.__dict__, "body": {}}
    with pytest.raises(RefusedMessageError, match="scale"):
        decode(pack(parts, header))


def said_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def assembled(manifest: dict[str, Any], buffer: bytes) -> bytes:
    text = json.dumps(manifest).encode()
    return len(text).to_bytes(8, "little") + text + buffer


def with_header(**values: Any) -> bytes:
    """A message of the right form whose header says something else; None leaves a field out."""
    header = {"version": VERSION, **HEADER.__dict__, "body": {}}
    return pack({}, {k: v for k, v in (header | values).items() if v is not None})


def test_what_was_written_comes_back_bit_by_bit() -> None:
    sent = message()
    back = decode(encode(sent))
    assert (back.header, back.body) == (sent.header, sent.body)
    assert list(back.tensors) == list(sent.tensors)
    for name, value in sent.tensors.items():
        assert back.tensors[name].dtype == value.dtype
        assert torch.equal(back.tensors[name], value)


def test_the_golden_file_is_read_and_written_the_same() -> None:
    """A change of the format has to raise `VERSION`, and keep this file under another name."""
    assert encode(message()) == GOLDEN.read_bytes()
    assert torch.equal(
        decode(GOLDEN.read_bytes()).tensors["g2/rows/value"], message().tensors["g2/rows/value"]
    )


def test_a_header_costs_less_than_a_hundredth() -> None:
    tensors = {f"g0/model.layers.{i}.q_proj/A": torch.zeros(8, 1024) for i in range(32)}
    data = encode(Message(HEADER, {}, tensors))
    assert len(data) < 1.01 * sum(value.nbytes for value in tensors.values())


@pytest.mark.parametrize("version", [0, VERSION + 1, "1", None])
def test_another_version_is_refused_with_what_to_do(version: Any) -> None:
    with pytest.raises(RefusedMessageError, match="install the same version of fedlora on both"):
        decode(with_header(version=version))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"run": None}, "no usable run"),
        ({"round": -1}, "no usable round"),
        ({"round": True}, "no usable round"),
        ({"attempt": "1"}, "no usable attempt"),
        ({"kind": 7}, "no usable kind"),
        ({"base": "x" * 2000}, "no usable base"),
        ({"extra": 1}, "unknown field: extra"),
        ({"body": [1]}, "no body"),
        ({"body": {"a": [[[[[[[[[]]]]]]]]]}}, "more than 8 deep"),
    ],
)
def test_headers_of_another_form_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedMessageError, match=words):
        decode(with_header(**values))


def test_sizes_are_held_against_the_limits_before_anything_is_read() -> None:
    data = encode(message())
    limits = Limits()
    for small, words in [
        (replace(limits, nbytes=len(data) - 1), "bytes, more than"),
        (replace(limits, text=100), "its text has"),
        (replace(limits, tensors=3), "4 tensors, more than 3"),
        (replace(limits, name=12), "which is no name"),
        (replace(limits, dimensions=1), "2 dimensions, more than 1"),
    ]:
        with pytest.raises(RefusedMessageError, match=words):
            decode(data, small)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "F8_E4M3"},
        {"shape": [2, 2]},
        {"shape": [2**40, 2**40]},
        {"shape": [-2, -3]},
        {"shape": "23"},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [4, 28]},
    ],
)
def test_manifests_that_lie_are_refused(change: dict[str, Any]) -> None:
    manifest, buffer = said_of(encode(message()))
    manifest["g0/model.layers.0.q_proj/A"] |= change
    with pytest.raises(RefusedMessageError):
        decode(assembled(manifest, buffer))


def test_text_that_nests_without_end_is_refused() -> None:
    deep = b"[" * 200_000
    with pytest.raises(RefusedMessageError, match="not JSON"):
        decode(len(deep).to_bytes(8, "little") + deep)


def test_every_changed_byte_is_noticed() -> None:
    """Cut short, longer, or changed anywhere: refused, never read as something else."""
    data, rng = encode(message()), random.Random(0)
    for length in (0, 7, 8, 9, 100, len(data) - 1):
        with pytest.raises(RefusedMessageError):
            decode(data[:length])
    with pytest.raises(RefusedMessageError):
        decode(data + b"\0")
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            back = decode(bytes(changed))
        except RefusedMessageError:
            continue
        # Blanks between JSON's tokens are all that may differ and mean the same.
        assert (back.header, back.body) == (HEADER, message().body)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"run": "another"}, "belongs to run another"),
        ({"base": "c"}, "base model of other weights"),
        ({"agreement": "c"}, "another agreement"),
        ({"round": 2}, "attempt 1 of round 2; the present one is attempt 1 of round 3"),
        ({"attempt": 0}, "attempt 0 of round 3"),
    ],
)
def test_what_belongs_elsewhere_is_refused(values: dict[str, Any], words: str) -> None:
    check_header(replace(HEADER, kind="any"), HEADER)
    with pytest.raises(RefusedMessageError, match=words):
        check_header(replace(HEADER, **values), HEADER)
