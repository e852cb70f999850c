"""Finds in a rendered conversation what the model itself would have to write.

A turn of the assistant's begins where its text goes on after the prompt for generation. It ends
with its text and the special token that ends it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from fedlora.data.chat_messages import UnusableRowError, says
from fedlora.data.chat_trace import Messages, Traced, plain_rendering, traced
from fedlora.data.rendered import Chat
from fedlora.data.spans import Span, common_prefix

_ONE_BY_ONE = (
    "the chat template does not go through the messages one by one, so that assistant turns cannot "
    "be told apart"
)


def trace_of(chat: Chat, tokenizer: Any) -> Traced:
    """The conversation, rendered and traced.

    Raises:
        UnusableRowError: the template does not go through the messages one by one.
    """
    trace = traced(tokenizer, chat.messages, chat.extra or {})
    if trace is None:
        raise UnusableRowError(_ONE_BY_ONE)
    return trace


def answers(chat: Chat, *, left_out: bool) -> list[int]:
    """The assistant's turns that say something: those that are learnt, or those left out."""
    return [
        i
        for i, message in enumerate(chat.messages)
        if message["role"] == "assistant" and says(message) and (i in chat.left_out) == left_out
    ]


def assistant_spans(chat: Chat, tokenizer: Any, trace: Traced, turns: Sequence[int]) -> list[Span]:
    """Where in the rendered conversation stands what the model would have to write.

    Args:
        chat: the conversation.
        tokenizer: with its chat template.
        trace: of the conversation.
        turns: the numbers of the assistant's turns that are meant.

    Raises:
        UnusableRowError: the template leaves one out, or its text cannot be told from others'.
    """
    spans: list[Span] = []
    for i in turns:
        message, parts = chat.messages[i], trace.parts[i]
        if not _is_there(chat, tokenizer, trace, i):
            raise UnusableRowError("the chat template leaves an assistant turn's text out")
        if not parts and message.get("content"):
            raise UnusableRowError(_ONE_BY_ONE)
        for part, (lo, hi) in enumerate(parts):
            begin = lo
            if part == 0:
                begin += _length_of_prompt(chat, tokenizer, i, trace.text[lo:hi])
            ends_turn = part == len(parts) - 1 and not _goes_on(chat, trace, i)
            end = _end(trace.text, begin, hi, message, tokenizer, ends_turn)
            if begin < end:
                spans.append((begin, end))
    return spans


_ADDED = "\ue000\uf8ff\ue001"
"""Characters of Unicode's private use that no text has in a row, and no template looks for."""


def _is_there(chat: Chat, tokenizer: Any, trace: Traced, i: int) -> bool:
    """Whether the template shows a turn's content to its end.

    Where the content's end cannot be seen (it may be escaped or trimmed), something is added to it
    that has to show.
    """
    message = chat.messages[i]
    content = str(message.get("content", "")).strip()
    if not content or content[-16:] in trace.of(i) or "tool_calls" in message:
        return True
    messages = list(chat.messages)
    messages[i] = {**message, "content": message["content"] + _ADDED}
    return _ADDED in plain_rendering(tokenizer, messages, chat.extra or {})


# --- where a turn begins ---


def _length_of_prompt(chat: Chat, tokenizer: Any, i: int, text: str) -> int:
    """How much of a turn's text the prompt for generation has said already.

    As far as the text begins like the prompt ends, in whole tags and lines: earlier turns need not
    have all of it (`<think>`), and an answer may begin with the same `<`.
    """
    # transformers renders no empty conversation, and some templates not one that ends here, or
    # begin a turn here without being asked to. A question alone is tried then.
    for before in (chat.messages[:i], [{"role": "user", "content": "x"}]):
        prompt = _generation_prompt(before, chat.extra or {}, tokenizer) if before else ""
        if prompt and (length := _common_pieces(prompt, text)):
            return length
    return 0


def _common_pieces(prompt: str, text: str) -> int:
    """How many characters of a text repeat the prompt's first tags, lines and words between."""
    begin = 0 if prompt[0].isspace() else len(text) - len(text.lstrip())
    length = begin
    for piece in re.findall(r"<[^<>\n]*>|\n|[^<\n]+|<", prompt):
        if not text.startswith(piece, length):
            break
        length += len(piece)
    return length if length > begin else 0


def _generation_prompt(before: Messages, extra: Mapping[str, Any], tokenizer: Any) -> str:
    """What the template adds behind these messages to make the model answer."""
    try:
        asking = traced(tokenizer, before, extra, True)
        if asking is None:
            return ""
        added = asking.text[asking.rest :]
        if added.strip():
            return added
        plain = traced(tokenizer, before, extra)
    except Exception:  # it takes no conversation that ends here
        return ""
    if plain is None:
        return ""
    # Some write the prompt within the last message's iteration: it is what differs there.
    with_prompt, without_prompt = _from_last_message(asking), _from_last_message(plain)
    return with_prompt[common_prefix(with_prompt, without_prompt) :]


def _from_last_message(trace: Traced) -> str:
    last = trace.parts[-1]
    return trace.text[last[-1][0] if last else 0 :]


# --- where a turn ends ---


def _goes_on(chat: Chat, trace: Traced, i: int) -> bool:
    """Whether the next text that follows a turn is the assistant's too."""
    end = trace.parts[i][-1][1]
    after = [(lo, j) for j, parts in enumerate(trace.parts) for lo, _ in parts if lo >= end]
    return bool(after) and chat.messages[min(after)[1]]["role"] == "assistant"


def _end(
    text: str, lo: int, hi: int, message: Mapping[str, Any], tokenizer: Any, ends_turn: bool
) -> int:
    """Where what is learnt of a part ends: with its text, and the special token that ends a turn.

    White space at the end is the template's, unless the content itself ends in it.
    """
    kept = text[lo:hi].rstrip()
    end = lo + len(kept)
    if not ends_turn or kept.endswith(tuple(special_tokens(tokenizer))):
        return end
    special = "|".join(map(re.escape, special_tokens(tokenizer)))
    if match := re.compile(rf"\s*(?:{special})").match(text, end):
        return match.end()
    content = str(message.get("content", ""))
    space = content[len(content.rstrip()) :]
    if kept.endswith(content.rstrip()) and text.startswith(space, end):
        return min(end + len(space), hi)
    return end


@lru_cache(maxsize=4)
def special_tokens(tokenizer: Any) -> list[str]:
    """A tokenizer's special tokens as text, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token) for token in added.values() if token.special}
    return sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
