"""Turns a row into a prompt and a completion, a conversation, or a text to classify."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from fedlora.errors import InputError
from fedlora.rows import Row


class UnusableRowError(ValueError):
    """Nothing can be learnt from this row; the reason is counted, and the run goes on."""


@dataclass(frozen=True)
class Chat:
    """A conversation for the tokenizer's chat template.

    Args:
        messages: `{"role": ..., "content": ...}`, as transformers takes them.
        prompt: how many of them, from the first, are the prompt; None: every assistant turn is
            learnt.
        extra: `tools` and `chat_template_kwargs` of the row, for the chat template.
    """

    messages: list[dict[str, Any]]
    prompt: int | None = None
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Classified:
    """A text, or a pair, and its label."""

    texts: tuple[str, ...]
    label: str


Rendered = tuple[str, str] | Chat | Classified
"""`(prompt, completion)`, a conversation, or a text with its label."""


@dataclass(frozen=True)
class Template:
    """How a row is read.

    Args:
        name: what `template:` says.
        columns: each entry is a tuple of alternatives, one of which a row must have.
        render: `row -> Rendered`; raises `UnusableRowError`.
        optional: columns the data must have, but a row may leave empty.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    render: Callable[[Row], Rendered]
    optional: tuple[str, ...] = ()

    def missing(self, columns: Sequence[str]) -> list[str]:
        """What the data lacks for it."""
        absent = [" or ".join(names) for names in self.columns if not set(names) & set(columns)]
        return absent + [name for name in self.optional if name not in columns]


def _first(row: Row, *names: str) -> str:
    return next((str(row[name]) for name in names if row.get(name) is not None), "")


def _alpaca(row: Row) -> tuple[str, str]:
    context = _first(row, "input", "context").strip()
    if context:
        lead = (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
        )
        middle = f"### Instruction:\n{row['instruction']}\n\n### Input:\n{context}"
    else:
        lead = (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n"
        )
        middle = f"### Instruction:\n{row['instruction']}"
    return f"{lead}{middle}\n\n### Response:\n", _first(row, "output", "response")


ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's names for who speaks (`from`), and the roles of chat templates."""


def _chat(row: Row) -> Chat:
    turns = row["messages"] if row.get("messages") is not None else row["conversations"]
    messages = _messages(turns)
    if row.get("messages") is None:
        # ShareGPT's conversations may begin in the middle; what answers nothing is left out.
        first = int(bool(messages) and messages[0]["role"] == "system")
        while messages[first:] and messages[first]["role"] == "assistant":
            del messages[first]
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise UnusableRowError("no assistant turn to learn")
    return Chat(messages, None, _extra(row))


def _messages(turns: Any) -> list[dict[str, Any]]:
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError(
            f"template: chat needs a list of turns, each with role and content (or from and "
            f"value); got {repr(turns)[:60]}"
        )
    out = []
    for turn in turns:
        if "from" in turn and "value" in turn:
            role = ROLES.get(str(turn["from"]))
            if role is None:
                raise UnusableRowError(f"unknown speaker {turn['from']!r}")
            message = {"role": role, "content": turn["value"]}
        elif "role" in turn:
            message = {**turn, "content": turn.get("content")}
        else:
            raise InputError(
                f"template: chat needs role and content (or from and value) in every turn; got "
                f"{', '.join(map(str, turn)) or 'nothing'}"
            )
        if message["content"] is None:
            message["content"] = ""
        if not isinstance(message["content"], str):
            raise UnusableRowError("a turn's content is not text")
        out.append(message)
    return out


def _extra(row: Row) -> dict[str, Any]:
    extra = dict(row.get("chat_template_kwargs") or {})
    tools = row.get("tools")
    if isinstance(tools, str) and tools:  # as TRL takes them: columns cannot hold all functions
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"template: chat: tools is no JSON: {error}: {tools[:60]!r}") from None
    return {**extra, "tools": tools} if tools else extra


def _prompt_completion(row: Row) -> tuple[str, str] | Chat:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _messages(prompt)
        return Chat([*before, *_messages(completion)], len(before), _extra(row))
    return str(prompt), str(completion)


TEMPLATES = {
    t.name: t
    for t in (
        Template("alpaca", (("instruction",), ("output", "response")), _alpaca),
        Template("chat", (("messages", "conversations"),), _chat),
        Template("prompt_completion", (("prompt",), ("completion",)), _prompt_completion),
        Template("text", (("text",),), lambda row: ("", str(row["text"]))),
    )
}


def custom(prompt: str, completion: str) -> Template:
    """A user's own template: `{column}` stands for a column, `{{` and `}}` for braces.

    A prompt's column may be empty in a row, a completion's may not.

    Raises:
        InputError: unbalanced braces, or more than a column's name between them.
    """
    before = _parse("prompt_template", prompt)
    after = _parse("completion_template", completion)
    names = [name for _, name in after if name is not None]
    if not names:
        raise InputError(f"completion_template: {completion!r} names no {{column}} to learn")

    def render(row: Row) -> tuple[str, str]:
        return _fill(before, row), _fill(after, row)

    optional = tuple(name for _, name in before if name is not None and name not in names)
    return Template("custom", tuple((name,) for name in names), render, optional)


def _parse(key: str, text: str) -> list[tuple[str, str | None]]:
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise InputError(
            f"{key}: {text!r}: {error}; write {{column}}, and {{{{ or }}}} for braces themselves"
        ) from None
    for _, name, form, conversion in parts:
        if name == "" or form or conversion:
            raise InputError(f"{key}: {text!r}: expected a column's name alone between braces")
    return [(literal, name) for literal, name, _, _ in parts]


def _fill(parts: Sequence[tuple[str, str | None]], row: Row) -> str:
    return "".join(
        literal + ("" if name is None or row.get(name) is None else str(row[name]))
        for literal, name in parts
    )


TEXT_COLUMNS = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""Columns of a classifier's text by which it is recognised: those of GLUE and common data sets."""
LABEL_COLUMNS = ("label", "labels")


def classification(
    texts: Sequence[str] | None, label: str | None, columns: Sequence[str]
) -> Template:
    """The template of a classifier: one text column or a pair, and a label.

    Raises:
        InputError: the columns are not there; the message lists those present.
    """
    there = ", ".join(columns)
    if texts is None:
        texts = next((t for t in TEXT_COLUMNS if set(t) <= set(columns)), None)
        if texts is None:
            raise InputError(f"text_column_names: name the text's column; the data has {there}")
    if label is None:
        label = next((name for name in LABEL_COLUMNS if name in columns), None)
        if label is None:
            raise InputError(f"label_column_name: name the label's column; the data has {there}")
    for key, names in (("text_column_names", texts), ("label_column_name", [label])):
        for name in names:
            if name not in columns:
                raise InputError(f"{key}: {name!r} is not a column; the data has {there}")
    chosen, of_label = tuple(texts), label

    def render(row: Row) -> Classified:
        value = row[of_label]
        if isinstance(value, float) or not isinstance(value, str | int):
            raise InputError(
                f"label_column_name: {of_label} holds {value!r}; expected text or whole numbers"
            )
        return Classified(tuple(str(row[name]) for name in chosen), str(value))

    return Template("classification", (*((name,) for name in chosen), (label,)), render)


def choose_template(
    name: str,
    columns: Sequence[str],
    *,
    prompt_template: str | None = None,
    completion_template: str | None = None,
) -> Template:
    """The template of that name, or ("auto") the first whose columns are there.

    Raises:
        InputError: a column is missing; the message lists those present.
    """
    if completion_template:
        chosen = custom(prompt_template or "", completion_template)
    elif name != "auto":
        chosen = TEMPLATES[name]
    else:
        fitting = [t for t in TEMPLATES.values() if not t.missing(columns)]
        if not fitting:
            raise InputError(
                f"template: no template fits the columns {', '.join(columns)}; known are "
                + "; ".join(
                    f"{t.name} ({', '.join(' or '.join(c) for c in t.columns)})"
                    for t in TEMPLATES.values()
                )
                + "; for others write prompt_template and completion_template, or name "
                "label_column_name to classify"
            )
        return fitting[0]
    if absent := chosen.missing(columns):
        raise InputError(
            f"template: {chosen.name} needs the column {', '.join(absent)}; the data has "
            f"{', '.join(columns)}"
        )
    return chosen
