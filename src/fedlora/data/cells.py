"""Reads cells of a row: texts, and what it gives its chat template beside the messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.data.chat_messages import json_of, without_empty
from fedlora.data.rows import Row, is_null, is_text, no_text
from fedlora.errors import InputError


def text_of(row: Row, *names: str) -> str:
    """The first of these columns that is not empty, as text.

    Raises:
        InputError: it holds a list or an object.
    """
    for name in names:
        if not is_null(value := row.get(name)):
            if not is_text(value):
                raise InputError(no_text(name, value))
            return str(value)
    return ""


def numbers_of(left_out: Sequence[bool]) -> frozenset[int]:
    """The numbers of the turns that are left out of the loss."""
    return frozenset(i for i, left in enumerate(left_out) if left)


def extra_of(row: Row) -> dict[str, Any]:
    """What a row gives its chat template beside the messages: settings, and tools."""
    tools = _tools(row)
    return {**_settings(row), "tools": tools} if tools else _settings(row)


def _settings(row: Row) -> dict[str, Any]:
    """The column `chat_template_kwargs`, an object or the JSON text of one."""
    settings = row.get("chat_template_kwargs")
    if isinstance(settings, str) and settings.strip():
        settings = json_of("chat_template_kwargs", settings)
    settings = {} if is_null(settings) or settings == "" else settings
    if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
        raise InputError(
            f"template: chat_template_kwargs is no object with names: {repr(settings)[:60]}"
        )
    return dict(without_empty(settings))


def _tools(row: Row) -> list[Any]:
    """The column `tools`: a function, a list of them, or JSON text, as TRL takes it."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = json_of("tools", tools)
    if is_null(tools) or not tools or tools == "":
        return []
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"template: tools is no list of functions: {repr(tools)[:60]}")
    return [without_empty(tool) for tool in tools]
