"""Makes the tokens of a conversation, and tells which of them are the assistant's to learn."""

from __future__ import annotations

import re
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from fedlora.data.assistant_spans import answers, assistant_spans, special_tokens, trace_of
from fedlora.data.chat_messages import UnusableRowError
from fedlora.data.chat_trace import Messages, Traced, plain_rendering
from fedlora.data.rendered import Chat
from fedlora.data.spans import TextSpan, common_prefix, within
from fedlora.data.tool_calls import accepted_form
from fedlora.errors import InputError

Learnt = tuple[list[int], list[bool]]
"""Tokens, and for each whether it is learnt."""


def conversation(chat: Chat, tokenizer: Any, assistant_only: bool) -> Learnt:
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
        return _learnt(chat, tokenizer, assistant_only)
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


def _learnt(chat: Chat, tokenizer: Any, assistant_only: bool) -> Learnt:
    """As `conversation`, but whatever the template raises is let through."""
    chat, trace = accepted_form(chat, tokenizer)
    if chat.prompt is not None:
        ids, learnt = _completion(chat, tokenizer, assistant_only)
    elif assistant_only and _marks_assistant(chat, tokenizer):
        ids, learnt = _by_markers(chat, tokenizer)
    elif not getattr(tokenizer, "is_fast", False):
        raise InputError("template: chat needs a fast tokenizer, which knows where a token stands")
    elif assistant_only:
        # The spans are those of the turns that are learnt; nothing has to be taken out again.
        return _by_spans(chat, tokenizer, trace or trace_of(chat, tokenizer))
    else:
        ids = _tokens(tokenizer, plain_rendering(tokenizer, chat.messages, chat.extra or {}))
        learnt = [True] * len(ids)
    return ids, _without_left_out(chat, tokenizer, ids, learnt, trace)


def _tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a rendered text. None is added: the template writes the special ones itself."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- what is learnt ---


def _marks_assistant(chat: Chat, tokenizer: Any) -> bool:
    """Whether the template says itself what the assistant generates (transformers' marker)."""
    extra = chat.extra or {}
    template = tokenizer.get_chat_template(extra.get("chat_template"), extra.get("tools"))
    return bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))


def _by_markers(chat: Chat, tokenizer: Any) -> Learnt:
    """Learn what stands between the template's own markers (`{% generation %}`)."""
    encoded = tokenizer.apply_chat_template(
        chat.messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **(chat.extra or {}),
    )
    return list(encoded["input_ids"]), [bool(mask) for mask in encoded["assistant_masks"]]


def _completion(chat: Chat, tokenizer: Any, completion_only: bool) -> Learnt:
    """Learn all messages behind the prompt, whoever says them.

    The completion begins at the first token in which the whole conversation differs from the prompt
    alone; the tokenizer may join characters of both to one token.
    """

    def tokens(messages: Messages, generation: bool) -> list[int]:
        return _tokens(
            tokenizer, plain_rendering(tokenizer, messages, chat.extra or {}, generation)
        )

    ids = tokens(chat.messages, False)
    masked = 0
    if completion_only:
        masked = common_prefix(tokens(chat.messages[: chat.prompt], True), ids)
    return ids, [i >= masked for i in range(len(ids))]


def _by_spans(chat: Chat, tokenizer: Any, trace: Traced) -> Learnt:
    """Learn the spans of text that the model would have to generate.

    Where a template writes no special token at the end of the last turn, the end-of-text token is
    added, for without it the model would never learn to stop.
    """
    text = trace.text
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    spans = assistant_spans(chat, tokenizer, trace, answers(chat, left_out=False))
    end = spans[-1].end if spans else 0
    nothing_follows = not text[end:].strip()
    endless = nothing_follows and not text[:end].endswith(tuple(special_tokens(tokenizer)))
    if endless and spans:
        spans[-1] = TextSpan(spans[-1].begin, len(text))
    learnt = within(encoded["offset_mapping"], spans)
    return ([*ids, tokenizer.eos_token_id], [*learnt, True]) if endless else (ids, learnt)


def _without_left_out(
    chat: Chat, tokenizer: Any, ids: list[int], learnt: list[bool], trace: Traced | None
) -> list[bool]:
    """For each token whether it is learnt, now without the turns that are left out of the loss."""
    if not chat.left_out:
        return learnt
    trace = trace or trace_of(chat, tokenizer)
    encoded = tokenizer(trace.text, add_special_tokens=False, return_offsets_mapping=True)
    assert list(encoded["input_ids"]) == ids
    spans = assistant_spans(chat, tokenizer, trace, answers(chat, left_out=True))
    left_out = within(encoded["offset_mapping"], spans)
    return [learn and not out for learn, out in zip(learnt, left_out, strict=True)]
