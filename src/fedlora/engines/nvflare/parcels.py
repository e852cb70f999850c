"""Packs messages and answers for NVIDIA FLARE's tasks: one buffer of bytes each.

A buffer is an array of `np.uint8`: FLARE streams arrays, while plain `bytes` are slow and take
several times their size in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable

from fedlora.engines.carrier import KINDS, SiteError

CANCEL, STATUS = "fedlora_cancel", "fedlora_status"
"""Topics of what a site is asked while it is at a message."""

TOLD = ("round", "step", "steps", "loss")
"""What a site tells of its worker's status; all else of it stays there."""

_BUFFER = "message"
_SECONDS, _KIND, _REASON = "fedlora_seconds", "fedlora_kind", "fedlora_reason"

_FILTERED = (ReturnCode.TASK_DATA_FILTER_ERROR, ReturnCode.TASK_RESULT_FILTER_ERROR)


def pack(message: bytes, seconds: float | None = None) -> Shareable:
    """A message, with the seconds until its deadline (None: it has none)."""
    parcel = Shareable()
    parcel[_BUFFER] = np.frombuffer(message, np.uint8)
    parcel.set_header(_SECONDS, seconds)
    return parcel


def unpack(parcel: Shareable) -> tuple[bytes, float | None]:
    """A message and the seconds until its deadline.

    Raises:
        SiteError: there is none in it.
    """
    seconds = parcel.get_header(_SECONDS, None)
    return _bytes_of(parcel), None if seconds is None else float(seconds)


def pack_error(error: SiteError) -> Shareable:
    """What became of a message, in the place of an answer."""
    parcel = Shareable()
    parcel.set_header(_KIND, error.kind)
    parcel.set_header(_REASON, error.reason)
    return parcel


def unpack_answer(parcel: Any) -> bytes:
    """The answer to a message.

    Raises:
        SiteError: what became of the message instead, in the site's words or in FLARE's.
    """
    if not isinstance(parcel, Shareable):
        raise SiteError("failed", "what the site answered is no answer")
    kind, reason = parcel.get_header(_KIND, None), parcel.get_header(_REASON, None)
    if kind in KINDS and isinstance(reason, str):
        raise SiteError(kind, reason)
    code = parcel.get_return_code()
    if code == ReturnCode.OK:
        return _bytes_of(parcel)
    if code == ReturnCode.TASK_ABORTED:
        raise SiteError("deadline", "the call was given up at the site")
    if code in _FILTERED:
        raise SiteError("refused", f"a filter of the site lets it not pass ({code})")
    raise SiteError("failed", f"NVIDIA FLARE could not run it at the site ({code}); see its log")


def _bytes_of(parcel: Shareable) -> bytes:
    buffer = parcel.get(_BUFFER)
    if not isinstance(buffer, np.ndarray) or buffer.dtype != np.uint8 or buffer.ndim != 1:
        raise SiteError("refused", "it holds no message; install one version on all sides")
    return buffer.tobytes()
