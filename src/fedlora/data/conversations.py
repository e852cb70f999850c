"""Conversations as tokens, and which of them are the assistant's to learn."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from fedlora.data.chat_messages import UnusableRowError, says
from fedlora.data.rows import loads
from fedlora.data.templates import Chat
from fedlora.data.turns import Messages, Span, Traced, plain_rendering, traced
from fedlora.errors import InputError


def conversation(chat: Chat, tokenizer: Any, assistant_only: bool) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and for each whether it is learnt.

    Args:
        chat: the conversation.
        tokenizer: of transformers, with a chat template.
        assistant_only: learn the assistant's turns (or the completion) alone.

    Raises:
        UnusableRowError: the chat template refuses it, or leaves out what should be learnt.
        InputError: there is no chat template, or it is malformed.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "template: chat needs a chat template, and the tokenizer has none; give "
            "chat_template_path: a Jinja file, a tokenizer that has one, or vicuna"
        )
    try:
        chat, whole = _in_an_accepted_form(chat, tokenizer)
        if chat.prompt is not None:
            ids, learnt = _completion(chat, tokenizer, assistant_only)
        elif assistant_only and _marks_assistant(chat, tokenizer):
            ids, learnt = _by_markers(chat, tokenizer)
        else:
            return _by_spans(chat, tokenizer, assistant_only, whole)
        return ids, _without(chat, tokenizer, ids, learnt, whole)
    except (UnusableRowError, InputError):
        raise
    except TemplateSyntaxError as error:
        raise InputError(
            f"the chat template is malformed, line {error.lineno}: {_line(error)}; see "
            "chat_template_path"
        ) from None
    except ValueError as error:  # transformers': no default among several templates, bad tools
        raise InputError(f"the chat template: {_line(error)}") from None
    except TemplateError as error:
        raise UnusableRowError(f"the chat template refuses it: {_line(error)}") from None
    except Exception as error:  # whatever the template does with what it did not expect
        why = f"{type(error).__name__}: {_line(error)}"
        raise UnusableRowError(f"the chat template fails on it: {why}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long both begin alike: a completion begins where its prompt alone diverges from it."""
    if one == other[: len(one)]:
        return len(one)
    for i, (x, y) in enumerate(zip(one, other, strict=False)):
        if x != y:
            return i
    return min(len(one), len(other))


# --- how messages are given ---


def _in_an_accepted_form(chat: Chat, tokenizer: Any) -> tuple[Chat, Traced | None]:
    """The conversation in a form that the template shows, traced where that was needed.

    Templates differ in what they take where the assistant calls tools: arguments as an object or
    as JSON text, no content, or an empty one.
    """
    if not any("tool_calls" in message for message in chat.messages):
        return chat, None
    refused: Exception | None = None
    passable: tuple[Chat, Traced | None] | None = None
    for messages in _forms(chat.messages):
        form = replace(chat, messages=messages)
        try:
            found = traced(tokenizer, messages, chat.extra or {})
        except TemplateSyntaxError:
            raise
        except Exception as error:
            refused = refused or error
            continue
        if found is None or all(_shown(m, found.of(i)) for i, m in enumerate(messages)):
            return form, found
        passable = passable or (form, found)
    if passable is None:
        assert refused is not None
        raise refused
    form, found = passable
    assert found is not None
    for i, message in enumerate(form.messages):
        names = _called(message)
        if names and not message.get("content") and not any(n in found.of(i) for n in names):
            raise UnusableRowError("the chat template leaves the assistant's tool calls out")
    return passable


def _forms(messages: Messages) -> Iterator[list[dict[str, Any]]]:
    def content(message: Mapping[str, Any]) -> dict[str, Any]:
        """Without content where it was empty, with an empty one where it was not there."""
        if "tool_calls" not in message or message.get("content"):
            return dict(message)
        rest = {key: value for key, value in message.items() if key != "content"}
        return rest if "content" in message else {**rest, "content": ""}

    for arguments in (_as_given, _parsed, _as_text):
        seen = [_with_arguments(message, arguments) for message in messages]
        if arguments is not _as_given and seen == list(messages):
            continue
        yield seen
        yield [content(message) for message in seen]


def _with_arguments(message: Mapping[str, Any], change: Any) -> dict[str, Any]:
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


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _functions(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls", [])
    return [
        call["function"] if isinstance(call.get("function"), Mapping) else call for call in calls
    ]


def _called(message: Mapping[str, Any]) -> list[str]:
    return [str(function.get("name")) for function in _functions(message)]


def _shown(message: Mapping[str, Any], text: str) -> bool:
    """Whether all tool calls stand there, and no arguments as JSON text within other JSON."""
    given = [f["arguments"] for f in _functions(message) if isinstance(f.get("arguments"), str)]
    within = [f"{{{own}}}" for own in given if own.startswith("{")]
    within += [json.dumps(own, ensure_ascii=ascii) for own in given for ascii in (True, False)]
    return all(name in text for name in _called(message)) and not any(w in text for w in within)


# --- what is learnt ---


def _marks_assistant(chat: Chat, tokenizer: Any) -> bool:
    """Whether the template says itself what the assistant generates (transformers' marker)."""
    extra = chat.extra or {}
    template = tokenizer.get_chat_template(extra.get("chat_template"), extra.get("tools"))
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))


def _by_markers(chat: Chat, tokenizer: Any) -> tuple[list[int], list[bool]]:
    found = tokenizer.apply_chat_template(
        chat.messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **(chat.extra or {}),
    )
    return list(found["input_ids"]), [bool(x) for x in found["assistant_masks"]]


def _completion(chat: Chat, tokenizer: Any, completion_only: bool) -> tuple[list[int], list[bool]]:
    def tokens(messages: Messages, generation: bool) -> list[int]:
        text = plain_rendering(tokenizer, messages, chat.extra or {}, generation)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ids = tokens(chat.messages, False)
    masked = 0
    if completion_only:
        masked = common_prefix(tokens(chat.messages[: chat.prompt], True), ids)
    return ids, [i >= masked for i in range(len(ids))]


def _by_spans(
    chat: Chat, tokenizer: Any, assistant_only: bool, whole: Traced | None
) -> tuple[list[int], list[bool]]:
    """All turns, learnt are the spans of text that the model would have to generate."""
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("template: chat needs a fast tokenizer, which knows where a token stands")
    if not assistant_only:
        text = plain_rendering(tokenizer, chat.messages, chat.extra or {})
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids, _without(chat, tokenizer, ids, [True] * len(ids), whole)
    whole = whole or _followed(chat, tokenizer)
    text = whole.text
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(found["input_ids"])
    spans = _spans(chat, tokenizer, whole, _said(chat, left_out=False))
    last = spans[-1][1] if spans else 0
    # A template without an end-of-turn token: the model would never learn to stop.
    endless = not text[last:].strip() and not text[:last].endswith(tuple(_specials(tokenizer)))
    if endless and spans:
        spans[-1] = spans[-1][0], len(text)
    learnt = within(found["offset_mapping"], spans)
    return ([*ids, tokenizer.eos_token_id], [*learnt, True]) if endless else (ids, learnt)


def _without(
    chat: Chat, tokenizer: Any, ids: list[int], learnt: list[bool], whole: Traced | None
) -> list[bool]:
    """What is learnt, less the assistant's turns that are left out of the loss."""
    if not chat.left_out:
        return learnt
    whole = whole or _followed(chat, tokenizer)
    found = tokenizer(whole.text, add_special_tokens=False, return_offsets_mapping=True)
    assert list(found["input_ids"]) == ids
    spans = _spans(chat, tokenizer, whole, _said(chat, left_out=True))
    out = within(found["offset_mapping"], spans)
    return [learn and not left for learn, left in zip(learnt, out, strict=True)]


def within(places: Iterable[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens stand in a span, or reach into it."""
    return [
        any(begin < hi and (lo <= begin or lo < end) for lo, hi in spans) for begin, end in places
    ]


def _followed(chat: Chat, tokenizer: Any) -> Traced:
    found = traced(tokenizer, chat.messages, chat.extra or {})
    if found is None:
        raise UnusableRowError(_ONE_BY_ONE)
    return found


_ONE_BY_ONE = (
    "the chat template does not go through the messages one by one, so that assistant turns cannot "
    "be told apart"
)


def _said(chat: Chat, *, left_out: bool) -> list[int]:
    """The assistant's turns that say something: those that are learnt, or those left out."""
    return [
        i
        for i, message in enumerate(chat.messages)
        if message["role"] == "assistant" and says(message) and (i in chat.left_out) == left_out
    ]


def _spans(chat: Chat, tokenizer: Any, whole: Traced, turns: Sequence[int]) -> list[Span]:
    """Where in the rendered conversation stands what the model would have to write in these turns.

    A turn begins where its text goes on after the prompt for generation. It ends with its text and
    the special token that ends it.
    """
    spans = []
    for i in turns:
        if not _is_there(chat, tokenizer, whole, i):
            raise UnusableRowError("the chat template leaves an assistant turn's text out")
        if not whole.parts[i] and chat.messages[i].get("content"):
            raise UnusableRowError(_ONE_BY_ONE)
        found = []
        for j, (lo, hi) in enumerate(whole.parts[i]):
            begin = lo if j else lo + _head(chat, tokenizer, i, whole.text[lo:hi])
            last = j == len(whole.parts[i]) - 1 and not _goes_on(chat, whole, i)
            found.append((begin, _end(whole.text, begin, hi, chat.messages[i], tokenizer, last)))
        spans += [(begin, end) for begin, end in found if begin < end]
    return spans


def _goes_on(chat: Chat, whole: Traced, i: int) -> bool:
    """Whether the next text that follows a turn is the assistant's too."""
    end = whole.parts[i][-1][1]
    after = [(lo, j) for j, parts in enumerate(whole.parts) for lo, _ in parts if lo >= end]
    return bool(after) and chat.messages[min(after)[1]]["role"] == "assistant"


_ADDED = "\ue000\uf8ff\ue001"
"""Characters of Unicode's private use that no text has in a row, and no template looks for."""


def _is_there(chat: Chat, tokenizer: Any, whole: Traced, i: int) -> bool:
    """Whether the template shows a turn's content to its end."""
    message = chat.messages[i]
    content = str(message.get("content", "")).strip()
    if not content or content[-16:] in whole.of(i) or "tool_calls" in message:
        return True
    messages = list(chat.messages)
    messages[i] = {**message, "content": message["content"] + _ADDED}
    return _ADDED in plain_rendering(tokenizer, messages, chat.extra or {})


def _head(chat: Chat, tokenizer: Any, i: int, text: str) -> int:
    """How much of a turn's text the prompt for generation has said already.

    As far as the text begins like the prompt ends, in whole tags and lines: earlier turns need not
    have all of it (`<think>`), and an answer may begin with the same `<`.
    """
    # transformers renders no empty conversation, and some templates not one that ends here, or
    # begin a turn here without being asked to.
    for before in (chat.messages[:i], [{"role": "user", "content": "x"}]):
        prompt = _prompt(before, chat.extra or {}, tokenizer) if before else ""
        if prompt and (length := _common_pieces(prompt, text)):
            return length
    return 0


def _common_pieces(prompt: str, text: str) -> int:
    length = 0 if prompt[0].isspace() else len(text) - len(text.lstrip())
    begin = length
    for piece in re.findall(r"<[^<>\n]*>|\n|[^<\n]+|<", prompt):
        if not text.startswith(piece, length):
            break
        length += len(piece)
    return length if length > begin else 0


def _prompt(before: Messages, extra: Mapping[str, Any], tokenizer: Any) -> str:
    """What the template adds behind these messages to make the model answer."""
    try:
        asked = traced(tokenizer, before, extra, True)
        if asked is None:
            return ""
        added = asked.text[asked.rest :]
        if added.strip():
            return added
        bare = traced(tokenizer, before, extra)
    except Exception:  # it takes no conversation that ends here
        return ""
    if bare is None:
        return ""
    # Some write it within the last message's iteration.
    begins = [found.parts[-1][-1][0] if found.parts[-1] else 0 for found in (asked, bare)]
    one, other = asked.text[begins[0] :], bare.text[begins[1] :]
    return one[common_prefix(one, other) :]


def _end(
    text: str, lo: int, hi: int, message: Mapping[str, Any], tokenizer: Any, last: bool
) -> int:
    """Where what is learnt of a turn ends: with its text, and the special token that ends it."""
    kept = text[lo:hi].rstrip()
    end = lo + len(kept)
    if not last or kept.endswith(tuple(_specials(tokenizer))):
        return end
    special = "|".join(map(re.escape, _specials(tokenizer)))
    if found := re.compile(rf"\s*(?:{special})").match(text, end):
        return found.end()
    content = str(message.get("content", ""))
    space = content[len(content.rstrip()) :]
    if kept.endswith(content.rstrip()) and text.startswith(space, end):
        return min(end + len(space), hi)
    return end


@lru_cache(maxsize=4)
def _specials(tokenizer: Any) -> list[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token) for token in added.values() if token.special}
    return sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
