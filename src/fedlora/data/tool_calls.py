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
from fedlora.data.json_text import loads
from fedlora.data.rendered import Chat


def accepted_form(chat: Chat, tokenizer: Any) -> tuple[Chat, Traced | None]:
    """The conversation in a form in which the template shows its tool calls.

    Forms are tried until one shows every call by name, and no arguments as JSON text within other
    JSON. If none does, it is the first form that the template accepts at all.

    Returns:
        The conversation; and its trace, or None where it calls no tools or cannot be traced.

    Raises:
        UnusableRowError: no form shows a turn that is nothing but tool calls.
        Exception: what the template raised of the first form, where it takes none.
    """
    if not any("tool_calls" in message for message in chat.messages):
        return chat, None
    first_error: Exception | None = None
    first_accepted: tuple[Chat, Traced] | None = None
    for messages in _forms(chat.messages):
        form = replace(chat, messages=messages)
        try:
            trace = traced(tokenizer, messages, chat.extra or {})
        except TemplateSyntaxError:
            raise
        except Exception as error:  # whatever a template raises where it refuses a form
            first_error = first_error or error
            continue
        if trace is None or all(_shows(trace.of(i), m) for i, m in enumerate(messages)):
            return form, trace
        first_accepted = first_accepted or (form, trace)
    if first_accepted is None:
        assert first_error is not None
        raise first_error
    _refuse_invisible(*first_accepted)
    return first_accepted


def _refuse_invisible(chat: Chat, trace: Traced) -> None:
    """Refuse a turn that is nothing but tool calls of which the template shows none."""
    for i, message in enumerate(chat.messages):
        names = _names(message)
        if names and not message.get("content") and not any(n in trace.of(i) for n in names):
            raise UnusableRowError("the chat template leaves the assistant's tool calls out")


# --- the forms ---


def _forms(messages: Messages) -> Iterator[list[dict[str, Any]]]:
    """The messages in every form that is tried: arguments as given, as objects, as JSON text.

    Each of these comes with the content as given, and then with the other of no content and an
    empty one beside the calls.
    """
    for change in (_as_given, _as_object, _as_text):
        changed = [_with_arguments(message, change) for message in messages]
        if change is not _as_given and changed == list(messages):
            continue
        yield changed
        yield [_other_content(message) for message in changed]


def _other_content(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with tool calls, whose empty content is left out, or added where there is none."""
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
        function = call.get("function")
        if isinstance(function, Mapping) and "arguments" in function:
            call = {**call, "function": {**function, "arguments": change(function["arguments"])}}
        elif "arguments" in call:
            call = {**call, "arguments": change(call["arguments"])}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _as_given(arguments: Any) -> Any:
    return arguments


def _as_object(arguments: Any) -> Any:
    """Arguments in JSON text as the object that it holds; other arguments stay as they are."""
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
    """Whether all of a message's calls stand in its text, with no JSON text within other JSON."""
    arguments = [f["arguments"] for f in _functions(message) if isinstance(f.get("arguments"), str)]
    # What stands in the text where JSON text was put into braces or quotes once more.
    nested = [f"{{{json_text}}}" for json_text in arguments if json_text.startswith("{")]
    for ascii_only in (True, False):
        nested += [json.dumps(json_text, ensure_ascii=ascii_only) for json_text in arguments]
    all_named = all(name in text for name in _names(message))
    return all_named and not any(wrong in text for wrong in nested)
