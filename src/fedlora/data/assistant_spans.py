"""Finds in a rendered conversation what the model itself would have to write.

That part of an assistant's turn begins behind the prompt for generation, which the template writes
before the model answers. It ends with the turn's text and the special token that ends the turn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from fedlora.data.chat_messages import UnusableRowError, says
from fedlora.data.chat_trace import Messages, Traced, plain_rendering, traced
from fedlora.data.rendered import Chat
from fedlora.data.spans import TextSpan, common_prefix

_ONE_BY_ONE = (
    "the chat template does not go through the messages one by one, so that assistant turns cannot "
    "be told apart"
)


def trace_of(chat: Chat, tokenizer: Any) -> Traced:
    """Render and trace a conversation.

    Raises:
        UnusableRowError: the template does not go through the messages one by one.
    """
    trace = traced(tokenizer, chat.messages, chat.extra or {})
    if trace is None:
        raise UnusableRowError(_ONE_BY_ONE)
    return trace


def answers(chat: Chat, *, left_out: bool) -> list[int]:
    """Numbers of the assistant's turns that say something.

    Args:
        chat: the conversation.
        left_out: those that no loss is taken on, or the others.
    """
    return [
        i
        for i, message in enumerate(chat.messages)
        if message["role"] == "assistant" and says(message) and (i in chat.left_out) == left_out
    ]


def assistant_spans(
    chat: Chat, tokenizer: Any, trace: Traced, turns: Sequence[int]
) -> list[TextSpan]:
    """Where in the rendered conversation the model's own text stands, as described above.

    Args:
        chat: the conversation.
        tokenizer: with its chat template.
        trace: of the conversation.
        turns: the numbers of the assistant's turns to look for.

    Raises:
        UnusableRowError: the template leaves one out, or its text cannot be told from others'.
    """
    spans: list[TextSpan] = []
    for i in turns:
        message, parts = chat.messages[i], trace.parts[i]
        if not _is_shown(chat, tokenizer, trace, i):
            raise UnusableRowError("the chat template leaves an assistant turn's text out")
        if not parts and message.get("content"):
            raise UnusableRowError(_ONE_BY_ONE)
        for number, part in enumerate(parts):
            begin = part.begin
            if number == 0:
                begin += _length_of_prompt(chat, tokenizer, i, trace.text[part.begin : part.end])
            ends_turn = number == len(parts) - 1 and not _goes_on(chat, trace, i)
            end = _end(trace.text, TextSpan(begin, part.end), message, tokenizer, ends_turn)
            if begin < end:
                spans.append(TextSpan(begin, end))
    return spans


_ADDED = "\ue000\uf8ff\ue001"
"""Characters of Unicode's private use that no text has in a row, and no template looks for."""


def _is_shown(chat: Chat, tokenizer: Any, trace: Traced, i: int) -> bool:
    """Whether the template shows the content of turn i to its end.

    The end is looked for in the turn's text. A template may have escaped or trimmed it, though: if
    it is not there, the conversation is rendered again with a few characters added to the content,
    and these have to show.
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
    """How many characters of turn i's text the prompt for generation has written already.

    They are those with which both begin alike, counted in whole tags and lines. Not all of the
    prompt need be there, since earlier turns may lack a part of it (`<think>`); and an answer that
    begins with `<` shares this sign with a tag by accident.
    """
    # The prompt is what the template adds behind the messages before the turn. transformers
    # renders no empty conversation, though, and some templates refuse one that ends here, or begin
    # a turn without being asked to. The prompt behind a single question is tried then.
    for before in (chat.messages[:i], [{"role": "user", "content": "x"}]):
        prompt = _generation_prompt(before, chat.extra or {}, tokenizer) if before else ""
        if prompt and (length := _common_pieces(prompt, text)):
            return length
    return 0


def _common_pieces(prompt: str, text: str) -> int:
    """How many characters of a text repeat the prompt's first tags and lines, each as a whole."""
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
    # Some templates write the prompt within the last message's iteration of the loop. It is what
    # the message's text has more than without the prompt.
    with_prompt, without_prompt = _from_last_message(asking), _from_last_message(plain)
    return with_prompt[common_prefix(with_prompt, without_prompt) :]


def _from_last_message(trace: Traced) -> str:
    """The text from the last message's last part on."""
    last = trace.parts[-1]
    return trace.text[last[-1].begin if last else 0 :]


# --- where a turn ends ---


def _goes_on(chat: Chat, trace: Traced, i: int) -> bool:
    """Whether the text that follows turn i is the assistant's too, so that its turn goes on."""
    end = trace.parts[i][-1].end
    following = [
        (part.begin, message)
        for message, parts in enumerate(trace.parts)
        for part in parts
        if part.begin >= end
    ]
    return bool(following) and chat.messages[min(following)[1]]["role"] == "assistant"


def _end(
    text: str, part: TextSpan, message: Mapping[str, Any], tokenizer: Any, ends_turn: bool
) -> int:
    """Where what is learnt of a part of a turn ends.

    It ends with the part's text, and includes the special token that ends the turn. White space at
    the end is the template's, unless the content itself ends in it.

    Args:
        text: of the conversation.
        part: of the text, without the prompt for generation.
        message: the turn.
        tokenizer: of transformers.
        ends_turn: the part is the turn's last, and the assistant does not go on.
    """
    kept = text[part.begin : part.end].rstrip()
    end = part.begin + len(kept)
    if not ends_turn or kept.endswith(tuple(special_tokens(tokenizer))):
        return end
    special = "|".join(map(re.escape, special_tokens(tokenizer)))
    if match := re.compile(rf"\s*(?:{special})").match(text, end):
        return match.end()
    content = str(message.get("content", ""))
    space = content[len(content.rstrip()) :]
    if kept.endswith(content.rstrip()) and text.startswith(space, end):
        return min(end + len(space), part.end)
    return end


@lru_cache(maxsize=4)
def special_tokens(tokenizer: Any) -> list[str]:
    """A tokenizer's special tokens as text, the longest first."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token) for token in added.values() if token.special}
    return sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
