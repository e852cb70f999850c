"""Puts things into words: natural order, sizes, what was probably meant, numbers as JSON."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any


def nearest(
    key: str,
    among: Sequence[str] | Mapping[str, Any],
    otherwise: str = "; `fedlora config` lists all keys",
) -> str:
    """`; did you mean KEY?`, or something else where none is near."""
    close = difflib.get_close_matches(key, list(among), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else otherwise


def human_bytes(count: float) -> str:
    """`1536` -> `1.5 KB`; units of 1,000 bytes."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def bytes_of(text: str) -> int:
    """`1.5 GB` -> `1500000000`; `GB` are 1,000 and `GiB` 1,024 to the third.

    Raises:
        ValueError: it is no number with such a unit, or not greater than 0.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMGT])(i?)B?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is no size of memory; give one such as 6GB or 512MB")
    return int(
        float(match[1]) * (1024 if match[3] else 1000) ** (1 + "KMGT".index(match[2].upper()))
    )


def finite(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(key): finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def natural(text: str) -> list[Any]:
    """A key to sort by in which `site_10` follows `site_9`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def first_line(error: BaseException) -> str:
    """What an error says first, without its full stop; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
