"""What the model itself would have to write, on templates whose turns are written out by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from fedlora.data.assistant_spans import answers, assistant_spans, special_tokens, trace_of
from fedlora.data.chat_messages import UnusableRowError
from fedlora.data.rendered import Chat
from support.tokens import CHATML, byte_level, turns, with_chat

NO_CONTENT = "{% for m in messages %}[{{ m['role'] }}]{% endfor %}"
ALL_AT_ONCE = "{{ messages | map(attribute='content') | join('|') }}"


@cache
def tokenizer(template: str) -> Any:
    """Bytes, and a chat template."""
    special = ["<|im_start|>", "<|im_end|>"]
    return with_chat(byte_level(special, trained=False), template)


def learnt(chat: Chat, template: str = CHATML) -> list[str]:
    """The stretches of the rendered conversation that are learnt."""
    it = tokenizer(template)
    trace = trace_of(chat, it)
    spans = assistant_spans(chat, it, trace, answers(chat, left_out=False))
    return [trace.text[lo:hi] for lo, hi in spans]


def test_a_turn_goes_from_the_prompt_to_the_token_that_ends_it() -> None:
    assert learnt(Chat(turns("hi", "hello", "bye", "ciao"))) == [
        "hello<|im_end|>",
        "ciao<|im_end|>",
    ]


def test_turns_left_out_are_told_apart_from_those_that_are_learnt() -> None:
    chat = Chat(turns("a", "b", "c", "d"), left_out=frozenset({1}))
    assert answers(chat, left_out=False) == [3]
    assert answers(chat, left_out=True) == [1]
    assert learnt(chat) == ["d<|im_end|>"]
    assert answers(Chat(turns("a", "")), left_out=False) == []  # nothing was said


def test_an_answer_may_begin_like_the_prompt() -> None:
    assert learnt(Chat(turns("hi", "<b>hello</b>"))) == ["<b>hello</b><|im_end|>"]
    assert learnt(Chat(turns("hi", "assistant\nhello"))) == ["assistant\nhello<|im_end|>"]


def test_templates_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(UnusableRowError, match="leaves an assistant turn's text out"):
        learnt(Chat(turns("hi", "hello")), NO_CONTENT)
    with pytest.raises(UnusableRowError, match="does not go through the messages one by one"):
        learnt(Chat(turns("hi", "hello")), ALL_AT_ONCE)


def test_special_tokens_the_longest_first() -> None:
    tokens = special_tokens(tokenizer(CHATML))
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(tokens)
    assert [len(token) for token in tokens] == sorted(map(len, tokens), reverse=True)
