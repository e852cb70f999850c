"""Writes a message as bytes, a header and one buffer of tensors, and reads it without trusting it.

    eight bytes     the length of the text that follows, little-endian
    JSON            the manifest (name -> dtype, shape, offsets into the buffer) and, in its
                    `__metadata__`, the header below, a body of plain values, and a SHA-256
    one buffer      all numbers, one tensor after the other

That is the format of safetensors, so that an engine can carry a message as opaque bytes and any
program can look into it. What a site reads may come from anybody: sizes, counts, names and nesting
are held against `Limits` before anything is allocated, nothing that is read is executed, and every
refusal says what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from fedlora.errors import FedloraError
from fedlora.federation.codec import DamagedError, pack, unpack
from fedlora.federation.compression import Compression, packed, packing_of, unpacked

VERSION = 2
"""Of the format. It changes with the meaning of a message, never with what is added beside it.

    1    all tensors are as they were given
    2    some are packed in fewer bytes (`federation.compression`)

A message says the lowest version that it can be read by, and all versions are read.
"""

DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"})
"""Types of numbers that a message may hold, as safetensors names them."""


class RefusedMessageError(FedloraError):
    """Bytes that are no message of this federation; the text says why, and what to do."""


@dataclass(frozen=True)
class Header:
    """What a message says of itself.

    Args:
        run: the run's id. Every start of an engine draws one, so that an answer of an earlier
            start is recognised.
        round: counted from 1; 0 before the first.
        attempt: how often the same was asked before in this round, counted from 0.
        kind: what it is ("train", "trained", "step" ...).
        base: fingerprint of the base's frozen weights.
        agreement: digest of what server and clients agree on (`Agreement.digest`).
    """

    run: str
    round: int
    attempt: int
    kind: str
    base: str
    agreement: str


@dataclass(frozen=True)
class Message:
    """One message.

    Args:
        header: what it says of itself.
        body: plain values that JSON can hold.
        tensors: by name, in an order that is kept.
        compression: what some of them were rounded to, and are packed as.
    """

    header: Header
    body: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    compression: Compression = "none"


@dataclass(frozen=True)
class Limits:
    """What a reader is ready to take in.

    Args:
        nbytes: of a whole message.
        text: bytes of its JSON text.
        tensors: how many.
        name: characters of a tensor's name, and of a text in the header.
        dimensions: of a tensor.
        depth: of lists and objects within each other in the body.
    """

    nbytes: int = 2**36
    text: int = 2**25
    tensors: int = 2**17
    name: int = 1024
    dimensions: int = 4
    depth: int = 8


def encode(message: Message) -> bytes:
    """The message as bytes; numbers keep their dtype, bfloat16 too."""
    tensors, version = packed(message.tensors, message.compression), VERSION
    if tensors.keys() == message.tensors.keys():
        version = 1
    return pack(tensors, {"version": version, **asdict(message.header), "body": dict(message.body)})


def decode(data: bytes, limits: Limits | None = None) -> Message:
    """The inverse of `encode`, for bytes of any origin.

    Args:
        data: all bytes of one message.
        limits: what the reader is ready to take in.

    Raises:
        RefusedMessageError: it is longer or larger than the limits allow, was damaged on its way,
            is of another version of the format, or is no message at all.
    """
    limits = limits or Limits()
    manifest = _manifest(data, limits)
    _check_tensors(manifest, limits)
    said = _said(manifest)
    _check_version(said)
    header, body = _header(said, limits), said.get("body")
    if not isinstance(body, dict):
        raise RefusedMessageError("the message has no body of named values")
    if _depth(body) > limits.depth:
        raise RefusedMessageError(f"values of its body lie more than {limits.depth} deep")
    try:
        tensors = unpack(data).tensors
        compression = packing_of(tensors) if said["version"] > 1 else "none"
        if compression != "none":
            tensors = unpacked(tensors)
    except (DamagedError, ValueError) as error:
        raise RefusedMessageError(str(error)) from None
    return Message(header, body, tensors, compression)


def check_header(header: Header, expected: Header) -> None:
    """Refuse a message that belongs elsewhere: to another run, base, agreement, round or attempt.

    Args:
        header: of the message; its kind is the reader's to judge.
        expected: the one it should have.

    Raises:
        RefusedMessageError: the first thing that differs.
    """
    if header.run != expected.run:
        raise RefusedMessageError(f"it belongs to run {header.run}, not to {expected.run}")
    if header.base != expected.base:
        raise RefusedMessageError(
            "it was made for a base model of other weights; give both sides the same base and dtype"
        )
    if header.agreement != expected.agreement:
        raise RefusedMessageError(
            "the other side holds to another agreement (method, its options, target modules or "
            "seed); start both with the same configuration"
        )
    asked = expected.round, expected.attempt
    if (header.round, header.attempt) != asked:
        raise RefusedMessageError(
            f"it belongs to attempt {header.attempt} of round {header.round}; the present one is "
            f"attempt {expected.attempt} of round {expected.round}"
        )


def _manifest(data: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON text of a message, once its length is known to be harmless."""
    if len(data) > limits.nbytes:
        raise RefusedMessageError(f"it has {len(data)} bytes, more than {limits.nbytes}")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not 2 <= length <= len(data) - 8:
        raise RefusedMessageError("it is cut short, or no message")
    if length > limits.text:
        raise RefusedMessageError(f"its text has {length} bytes, more than {limits.text}")
    try:
        manifest = json.loads(bytes(data[8 : 8 + length]))
    except (ValueError, RecursionError):
        raise RefusedMessageError("its text is not JSON") from None
    if not isinstance(manifest, dict):
        raise RefusedMessageError("its text is no manifest of tensors")
    return manifest


def _check_tensors(manifest: Mapping[str, Any], limits: Limits) -> None:
    """Hold what the manifest announces against the limits; safetensors checks the offsets."""
    number = len(manifest) - ("__metadata__" in manifest)
    if number > limits.tensors:
        raise RefusedMessageError(f"it has {number} tensors, more than {limits.tensors}")
    for name, entry in manifest.items():
        if name == "__metadata__":
            continue
        if not 0 < len(name) <= limits.name or not name.isprintable():
            raise RefusedMessageError(f"a tensor is called {name[:40]!r}, which is no name")
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or entry.get("dtype") not in DTYPES:
            raise RefusedMessageError(f"tensor {name[:40]} has no shape, or numbers of no kind")
        if len(shape) > limits.dimensions:
            raise RefusedMessageError(
                f"tensor {name[:40]} has {len(shape)} dimensions, more than {limits.dimensions}"
            )


def _said(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the sender said beside the tensors."""
    try:
        said = json.loads(manifest["__metadata__"]["fedlora"])["header"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise RefusedMessageError("it has no header of fedlora") from None
    if not isinstance(said, dict):
        raise RefusedMessageError("it has no header of fedlora")
    return said


def _check_version(said: Mapping[str, Any]) -> None:
    version = said.get("version")
    if version not in range(1, VERSION + 1) or not isinstance(version, int):
        raise RefusedMessageError(
            f"it has version {str(version)[:20]} of the format, and this fedlora reads versions 1 "
            f"to {VERSION}; install the same version of fedlora on both sides"
        )


def _header(said: Mapping[str, Any], limits: Limits) -> Header:
    """The header, with every field of its type."""
    values: dict[str, Any] = {}
    for key in fields(Header):
        value = said.get(key.name)
        number = key.name in ("round", "attempt")
        fits = (
            isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
            if number
            else isinstance(value, str) and len(value) <= limits.name
        )
        if not fits:
            raise RefusedMessageError(f"its header has no usable {key.name}")
        values[key.name] = value
    unknown = set(said) - set(values) - {"version", "body"}
    if unknown:
        raise RefusedMessageError(f"its header has an unknown field: {min(unknown)[:40]}")
    return Header(**values)


def _depth(value: Any) -> int:
    """How deep lists and objects lie within each other; a plain value has none."""
    deepest, waiting = 0, [(value, 0)]
    while waiting:
        inner, depth = waiting.pop()
        deepest = max(deepest, depth)
        waiting += [(child, depth + 1) for child in _children(inner)]
    return deepest


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
