"""Packs a message of bytes into one array of a Flower record, and says what became of a call.

One array for each message: Flower's transport takes far longer for many small arrays than for one
of the same size. Neither torch nor transformers is imported, so that a ClientApp starts at once.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedlora.engines.carrier import KINDS, SiteError

_PACKED, _CALL, _PROBLEM, _SITE = "packed", "call", "problem", "site"
_MOST_SECONDS = 7 * 24 * 3600.0


def call_content(message: bytes, seconds: float | None) -> RecordDict:
    """The content of a message to a node.

    Args:
        message: that its worker is to answer.
        seconds: until the deadline; None: as long as it takes.
    """
    call = ConfigRecord({} if seconds is None else {"seconds": seconds})
    return RecordDict({_PACKED: _packed(message), _CALL: call})


def read_call(content: RecordDict) -> tuple[bytes, float | None]:
    """The message for the worker, and the seconds until its deadline."""
    seconds = content.config_records[_CALL].get("seconds")
    return _unpacked(content), None if seconds is None else float(seconds)


def answer_content(answer: bytes | SiteError) -> RecordDict:
    """The content of a node's reply: the worker's answer, or what became of the call instead."""
    if isinstance(answer, SiteError):
        problem = {"kind": answer.kind, "reason": answer.reason}
        return RecordDict({_PROBLEM: ConfigRecord(problem)})
    return RecordDict({_PACKED: _packed(answer)})


def read_answer(content: RecordDict) -> bytes | SiteError:
    """The worker's answer, or what became of the call instead."""
    problem = content.config_records.get(_PROBLEM)
    if problem is not None:
        kind = str(problem.get("kind"))
        return SiteError(kind if kind in KINDS else "failed", str(problem.get("reason"))[:2000])
    if _PACKED not in content.array_records:
        return SiteError("mistake", "its ClientApp is not fedlora's; it sends other records")
    return _unpacked(content)


def name_content(name: str) -> RecordDict:
    """The content of a node's reply to the query for its site's name."""
    return RecordDict({_SITE: ConfigRecord({"name": name})})


def read_name(content: RecordDict) -> str | SiteError:
    """The name of a node's site, or why it has told none."""
    if (record := content.config_records.get(_SITE)) is not None:
        return str(record["name"])
    answer = read_answer(content)
    return answer if isinstance(answer, SiteError) else SiteError("mistake", "it tells no name")


def ttl_of(seconds: float | None) -> float:
    """How long a message lives whose answer is waited for so many seconds."""
    return _MOST_SECONDS if seconds is None else max(1.0, seconds)


def _packed(data: bytes) -> ArrayRecord:
    return ArrayRecord({"bytes": Array(np.frombuffer(data, dtype=np.uint8))})


def _unpacked(content: RecordDict) -> bytes:
    return bytes(content.array_records[_PACKED]["bytes"].numpy().tobytes())
