"""Brings the turns of a conversation into the form of chat templates, whoever wrote them down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedlora.data.json_text import loads
from fedlora.data.rows import is_null
from fedlora.errors import InputError


class UnusableRowError(ValueError):
    """Nothing can be learnt from this row; the reason is counted, and the run goes on."""


ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's names for who speaks (`from`), and the roles of chat templates."""
SPEAKERS = ("human", "gpt", "chatgpt", "bard", "bing", "model")
"""Those of them that are no template's own roles, and so are translated in `role` too."""


def json_of(column: str, text: str) -> Any:
    """Parse the JSON text that stands in a column.

    Raises:
        InputError: it is no JSON.
    """
    try:
        return loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"template: {column} is no JSON: {error}: {text[:60]!r}") from None


def says(message: Mapping[str, Any]) -> bool:
    """Whether an assistant's message says something: text, thoughts or tool calls."""
    return any(
        message.get(key)
        for key in ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")
    )


LOSS_KEYS = ("weight", "train", "training", "loss")
"""Keys that say whether a loss is taken on a turn: OpenAI's, two of axolotl's, ms-swift's."""


def messages_of(turns: Any) -> tuple[list[dict[str, Any]], list[bool]]:
    """Turns as transformers takes them, and for each whether it is left out of the loss.

    Args:
        turns: a list of turns, or its JSON text, as CSV files and flat columns hold it.

    Raises:
        InputError: these are no turns.
        UnusableRowError: a turn cannot be used.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = json_of("chat", turns)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError(
            f"template: chat needs a list of turns, each with role and content (or from and "
            f"value); got {repr(turns)[:60]}"
        )
    messages, left_out = [], []
    for turn in turns:
        # Columns of typed data sets give every turn the keys of all others, with nothing in them.
        filled = without_empty(turn)
        message = _message(filled, turn)
        messages.append(message)
        left_out.append(message["role"] == "assistant" and _is_left_out(filled))
    return messages, left_out


def _message(filled: Mapping[str, Any], turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with role, content and tool calls as chat templates know them.

    Args:
        filled: the turn without its empty keys.
        turn: as it was given.
    """
    if "from" in filled and "value" in turn:
        message = _of_sharegpt(filled)
    elif "role" in filled:
        message = _of_openai(filled, has_content="content" in turn)
    else:
        raise InputError(
            f"template: chat needs role and content (or from and value) in every turn; got "
            f"{', '.join(map(str, turn)) or 'nothing'}"
        )
    if not isinstance(message["role"], str):
        raise UnusableRowError("a turn's role is not text")
    _set_calls(message)
    if "tool_calls" not in message or message["role"] != "assistant":
        message.setdefault("content", "")
    if isinstance(message.get("content"), list):
        message["content"] = _joined_parts(message["content"])
    if not isinstance(message.get("content", ""), str):
        raise UnusableRowError("a turn's content is not text")
    return message


def _of_sharegpt(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn that says `from` and `value`."""
    role = ROLES.get(str(turn["from"]))
    if role is None:
        raise UnusableRowError(f"unknown speaker {turn['from']!r}")
    message: dict[str, Any] = {"role": role}
    if "value" in turn:
        message["content"] = turn["value"]
    return _function_call(message) if turn["from"] == "function_call" else message


def _of_openai(turn: Mapping[str, Any], has_content: bool) -> dict[str, Any]:
    """A turn that says `role` and `content`, or `value` where nobody has a content.

    Args:
        turn: without its empty keys.
        has_content: the key is there, perhaps empty.
    """
    message = {key: value for key, value in turn.items() if key not in LOSS_KEYS}
    if message["role"] in SPEAKERS:
        message["role"] = ROLES[message["role"]]
    if not has_content and "value" in message:
        message["content"] = message.pop("value")
    return message


def _joined_parts(parts: list[Any]) -> str:
    """Content in OpenAI's parts (`{"type": "text", "text": ...}`) as one text.

    Raises:
        UnusableRowError: a part is not a text, such as a picture.
    """
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    for part, text in zip(parts, texts, strict=True):
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise UnusableRowError(f"a turn's content has a part that is no text: {kind}")
    return "".join(map(str, texts))


def without_empty(value: Any) -> Any:
    """A value without keys that hold nothing, however deep."""
    if isinstance(value, Mapping):
        return {key: without_empty(inner) for key, inner in value.items() if not is_null(inner)}
    return [without_empty(inner) for inner in value] if isinstance(value, list) else value


def _function_call(message: dict[str, Any]) -> dict[str, Any]:
    """A turn of ShareGPT's speaker `function_call`, whose content is JSON text, with tool calls.

    Content that is no object with a name, nor a list of these, stays text.
    """
    content = message.get("content")
    try:
        calls = loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        return message
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and "name" in call for call in calls):
        return message
    return {"role": message["role"], "tool_calls": [dict(call) for call in calls]}


def _set_calls(message: dict[str, Any]) -> None:
    """Tool calls in the form that chat templates know; an empty list of them is none."""
    if isinstance(single := message.pop("function_call", None), Mapping):  # OpenAI's former name
        message.setdefault("tool_calls", [dict(single)])
    calls = message.pop("tool_calls", None)
    if isinstance(calls, str):
        calls = json_of("tool_calls", calls) if calls.strip() else []
    if not calls:
        return
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UnusableRowError("tool_calls is no list of calls")
    message["tool_calls"] = [
        dict(call)
        if isinstance(call.get("function"), Mapping)
        else {"type": "function", "function": dict(call)}
        for call in calls
    ]


def _is_left_out(turn: Mapping[str, Any]) -> bool:
    """Whether no loss is taken on a turn.

    Raises:
        InputError: what is said about it is neither yes nor no.
    """
    if turn.get("train_detail"):
        raise InputError(
            "train_detail: parts of a turn cannot be left out of the loss; divide the turn, or use "
            "train: false for all of it"
        )
    left_out = False
    for key in LOSS_KEYS:
        value = turn.get(key, True)
        text = str(value).strip().lower()
        if text not in ("0", "0.0", "false", "1", "1.0", "true"):
            raise InputError(
                f"template: a turn's {key} is {value!r}; expected 1 or true (it is learnt), 0 or "
                "false (it is not)"
            )
        left_out = left_out or text in ("0", "0.0", "false")
    return left_out
