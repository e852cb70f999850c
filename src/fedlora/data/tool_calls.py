"""Finds the form in which a chat template shows the assistant's tool calls.

Templates differ in what they take where the assistant calls tools: arguments as an object or as
JSON text, no content, or an empty one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from jinja2 import TemplateSyntaxError

from fedlora.data.chat_messages import UnusableRowError
from fedlora.data.chat_trace import Messages, Traced, traced
from fedlora.data.rendered import Chat
from fedlora.data.rows import loads


def accepted_form(chat: Chat, tokenizer: Any) -> tuple[Chat, Traced | None]:
    """The conversation in a form that the template shows, traced where that was needed.

    Forms are tried until one shows every call by name, and no arguments as JSON text within other
    JSON. Else the first that the template takes at all is used.

    Raises:
        UnusableRowError: no form shows a turn that is nothing but tool calls.
        Exception: what the template raised of the first form, where it takes none.
    """
    if not any("tool_calls" in message for message in chat.messages):
        return chat, None
    refused: Exception | None = None
    taken: tuple[Chat, Traced] | None = None
    for messages in _forms(chat.messages):
        form = replace(chat, messages=messages)
        try:
            trace = traced(tokenizer, messages, chat.extra or {})
        except TemplateSyntaxError:
            raise
        except (
            Exception
        ) as error:  # a template raises what it likes of a form that it does not take
            refused = refused or error
            continue
        if trace is None or all(_shows(trace.of(i), m) for i, m in enumerate(messages)):
            return form, trace
        taken = taken or (form, trace)
    if taken is None:
        assert refused is not None
        raise refused
    _refuse_invisible(*taken)
    return taken


def _refuse_invisible(chat: Chat, trace: Traced) -> None:
    """Refuse a turn that is nothing but tool calls of which the template shows none."""
    for i, message in enumerate(chat.messages):
        names = _names(message)
        if names and not message.get("content") and not any(n in trace.of(i) for n in names):
            raise UnusableRowError("the chat template leaves the assistant's tool calls out")


# --- the forms ---


def _forms(messages: Messages) -> Iterator[list[dict[str, Any]]]:
    """The messages as given, with arguments as objects, then as JSON text; each with and without
    empty content beside the calls."""
    for change in (_as_given, _as_object, _as_text):
        changed = [_with_arguments(message, change) for message in messages]
        if change is not _as_given and changed == list(messages):
            continue
        yield changed
        yield [_other_content(message) for message in changed]


def _other_content(message: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with tool calls: without content where that was empty, with an empty one where there
    was none."""
    if "tool_calls" not in message or message.get("content"):
        return dict(message)
    rest = {key: value for key, value in message.items() if key != "content"}
    return rest if "content" in message else {**rest, "content": ""}


def _with_arguments(message: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A message whose calls have their arguments in another form."""
    if "tool_calls" not in message:
        return dict(message)
    calls = []
    for call in message["tool_calls"]:
        if isinstance(inner := call.get("function"), Mapping) and "arguments" in inner:
            call = {**call, "function": {**inner, "arguments": change(inner["arguments"])}}
        elif "arguments" in call:
            call = {**call, "arguments": change(call["arguments"])}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _as_given(arguments: Any) -> Any:
    return arguments


def _as_object(arguments: Any) -> Any:
    """Arguments in JSON text as the object it says; what says none stays."""
    if not isinstance(arguments, str):
        return arguments
    try:
        parsed = loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


# --- what a template shows of them ---


def _functions(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The functions that a message calls, with or without OpenAI's object around each."""
    calls = message.get("tool_calls", [])
    return [
        call["function"] if isinstance(call.get("function"), Mapping) else call for call in calls
    ]


def _names(message: Mapping[str, Any]) -> list[str]:
    return [str(function.get("name")) for function in _functions(message)]


def _shows(text: str, message: Mapping[str, Any]) -> bool:
    """Whether all tool calls stand there, and no arguments as JSON text within other JSON."""
    given = [f["arguments"] for f in _functions(message) if isinstance(f.get("arguments"), str)]
    quoted = [f"{{{own}}}" for own in given if own.startswith("{")]
    quoted += [json.dumps(own, ensure_ascii=ascii) for own in given for ascii in (True, False)]
    return all(name in text for name in _names(message)) and not any(q in text for q in quoted)
