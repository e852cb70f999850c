"""Reads preference data: a prompt, an answer that was chosen and one that was rejected.

fedlora's own training learns the chosen answer, as it would learn any other. A training of the
user's own, such as TRL's DPOTrainer, also finds both answers in its rows, in TRL's form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedlora.data.cells import extra_of, text_of
from fedlora.data.chat_messages import UnusableRowError, messages_of
from fedlora.data.rendered import Answered, Chat, Preference, Rendered
from fedlora.data.rows import Row, is_null
from fedlora.data.spans import common_prefix
from fedlora.errors import InputError

if TYPE_CHECKING:
    from fedlora.data.tokenize import Outcome

Messages = list[dict[str, Any]]

_NO_PROMPT = (
    "template: preference needs a prompt: the column prompt (or conversations), or a chosen and a "
    "rejected conversation that begin alike"
)


def preference_of(row: Row) -> Preference:
    """A row of texts, or of conversations, as its prompt with both answers.

    Conversations may be lists of turns, or answers of one turn, and their prompt may be a text, the
    turns of `prompt` or `conversations` (ShareGPT's), or what both begin with.

    Raises:
        InputError: there is no prompt, or the answers are neither texts nor turns.
        UnusableRowError: both answers are the same.
    """
    asked = row.get("prompt")
    if is_null(asked) or asked == "":
        asked = row.get("conversations")
    kinds = [isinstance(x, list | Mapping) for x in (row["chosen"], row["rejected"])]
    if kinds[0] != kinds[1]:
        raise InputError(
            "template: preference: one of chosen and rejected is text and the other a "
            "conversation; write both in one form"
        )
    conversational = kinds[0] or isinstance(asked, list)
    preference = _of_messages(row, asked) if conversational else _of_texts(row)
    if preference.chosen == preference.rejected:
        raise UnusableRowError("chosen and rejected are the same")
    return preference


def _of_texts(row: Row) -> Preference:
    prompt, chosen, rejected = (text_of(row, key) for key in ("prompt", "chosen", "rejected"))
    if not prompt:
        prompt = chosen[: common_prefix(chosen, rejected)]
        if not prompt.strip():
            raise InputError(_NO_PROMPT)
        prompt = prompt.removesuffix(" ")  # the blank before a word belongs to the word
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return Preference((prompt, chosen), (prompt, rejected))


def _of_messages(row: Row, asked: Any) -> Preference:
    """Of turns; the prompt ends before the first turn in which the conversations differ."""
    chosen, rejected = _turns(row["chosen"]), _turns(row["rejected"])
    before: Messages = messages_of(asked)[0] if isinstance(asked, list) else []
    if not before and isinstance(asked, str) and chosen[:1] and chosen[0]["role"] == "assistant":
        before = [{"role": "user", "content": asked}]
    system = text_of(row, "system").strip()
    if system and not any(turn["role"] == "system" for turn in (before or chosen)[:1]):
        before = [{"role": "system", "content": system}, *before]
    chosen, rejected = [*before, *chosen], [*before, *rejected]
    shared = _shared(chosen, rejected)
    if not any(turn["role"] != "system" for turn in chosen[:shared]):
        raise InputError(_NO_PROMPT)
    extra = extra_of(row)
    return Preference(Chat(chosen, shared, extra), Chat(rejected, shared, extra))


def _turns(answer: Any) -> Messages:
    """An answer's turns: a list of them, a single one, or its text."""
    if isinstance(answer, str):
        answer = {"role": "assistant", "content": answer}
    return messages_of([answer] if isinstance(answer, Mapping) else answer)[0]


def _shared(one: Messages, other: Messages) -> int:
    """How many turns two conversations begin with alike, so that both have an answer left."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), max(most, 0))


def with_answers(
    rendered: Sequence[Rendered | str], outcomes: Sequence[Outcome]
) -> Sequence[Outcome]:
    """Tokenised rows, those of preference data with `prompt`, `chosen` and `rejected`.

    Args:
        rendered: the rows as their template reads them.
        outcomes: their tokens, or why they are dropped.
    """
    return [
        {**outcome, **_in_form_of_trl(row)}
        if isinstance(row, Preference) and not isinstance(outcome, str)
        else outcome
        for row, outcome in zip(rendered, outcomes, strict=True)
    ]


def _in_form_of_trl(row: Preference) -> dict[str, Any]:
    """Both answers as TRL's trainers take them: texts, or lists of messages."""
    prompt, chosen = _parts(row.chosen)
    values = {"prompt": prompt, "chosen": chosen, "rejected": _parts(row.rejected)[1]}
    extra = dict(row.chosen.extra or {}) if isinstance(row.chosen, Chat) else {}
    tools = extra.pop("tools", None)
    return {
        **values,
        **({"tools": tools} if tools else {}),
        **({"chat_template_kwargs": extra} if extra else {}),
    }


def _parts(answered: Answered) -> tuple[Any, Any]:
    """The prompt and the answer."""
    if isinstance(answered, Chat):
        return answered.messages[: answered.prompt], answered.messages[answered.prompt :]
    return answered
