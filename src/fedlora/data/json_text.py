"""Parses JSON as data sets hold it, with NaN and with texts that were cut within a character."""

from __future__ import annotations

import json
import re
from typing import Any

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def loads(text: str) -> Any:
    """Parse JSON as pandas and Python write it, in which NaN stands for a missing value: None.

    A lone half of a surrogate pair becomes U+FFFD, the replacement character. Such halves occur
    where a text was cut in the middle of an emoji; they are no characters, and no tokenizer takes
    them.

    Raises:
        ValueError: it is malformed.
    """
    value = json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))
    return _whole_characters(value) if _SURROGATE.search(text) else value


def _whole_characters(value: Any) -> Any:
    """A JSON value with U+FFFD in the place of lone surrogates."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(inner) for key, inner in value.items()}
    return [_whole_characters(inner) for inner in value] if isinstance(value, list) else value
