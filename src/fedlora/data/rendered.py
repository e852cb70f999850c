"""Holds what a template makes of a row: a prompt and a completion, a chat, a labelled text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chat:
    """A conversation for the tokenizer's chat template.

    Args:
        messages: `{"role": ..., "content": ...}`, as transformers takes them.
        prompt: how many of them, from the first, are the prompt; None: every assistant turn is
            learnt.
        extra: `tools` and `chat_template_kwargs` of the row, for the chat template.
        left_out: which of the assistant's turns no loss is taken on (`weight: 0`).
    """

    messages: list[dict[str, Any]]
    prompt: int | None = None
    extra: Mapping[str, Any] | None = None
    left_out: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Classified:
    """A text, or a pair, and its label."""

    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Turns:
    """Prompts and completions by turns: all completions are learnt.

    Args:
        pairs: `(prompt, completion)`, the earliest first.
    """

    pairs: tuple[tuple[str, str], ...]


Answered = tuple[str, str] | Chat
"""A prompt with one answer: `(prompt, completion)`, or a conversation that says where it ends."""


@dataclass(frozen=True)
class Preference:
    """One prompt with two answers, of which the first was preferred."""

    chosen: Answered
    rejected: Answered


OneAnswer = tuple[str, str] | Turns | Chat | Classified
"""`(prompt, completion)`, several of them, a conversation, or a text with its label."""
Rendered = OneAnswer | Preference


def learnt_part(row: Rendered) -> OneAnswer:
    """What fedlora's own training learns of a row: of two answers the one that was chosen."""
    return row.chosen if isinstance(row, Preference) else row
