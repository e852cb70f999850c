"""Whose text is whose in a rendered conversation."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.data.chat_trace import plain_rendering, traced
from support.tokens import CHATML, byte_level, turns, with_chat

TWO = turns("hi", "hello")
BY_INDEX = (
    "{% for i in range(messages | length) %}{% set m = messages[i] %}"
    "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
)
NESTED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q{{ m['content'] }}"
    "{% for n in messages %}{% if n['role'] == 'assistant' %}A{{ n['content'] }}{% endif %}"
    "{% endfor %}.{% endif %}{% endfor %}end"
)
LOOKS_AHEAD = (
    "{% for m in messages %}{% if loop.last %}last:{% endif %}{{ m['content'] }}|{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token per byte."""
    return byte_level(trained=False)


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (CHATML, ["<|im_start|>user\nhi<|im_end|>\n", "<|im_start|>assistant\nhello<|im_end|>\n"]),
        (BY_INDEX, ["user: hi\n", "assistant: hello\n"]),
        (NESTED, ["Qhi.", "Ahello"]),
        (LOOKS_AHEAD, ["hi|", "last:hello|"]),
    ],
)
def test_every_character_is_its_messages(template: str, parts: list[str], tokenizer: Any) -> None:
    it = with_chat(tokenizer, template)
    trace = traced(it, TWO, {})
    assert trace is not None
    assert trace.text == plain_rendering(it, TWO, {})
    assert [trace.of(i) for i in range(2)] == parts


def test_what_follows_the_last_message_is_the_rest(tokenizer: Any) -> None:
    trace = traced(with_chat(tokenizer, CHATML), TWO[:1], {}, True)
    assert trace is not None
    assert trace.text[trace.rest :] == "<|im_start|>assistant\n"


def test_settings_of_the_row_reach_the_template(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{{ mark }}{% endfor %}"
    trace = traced(with_chat(tokenizer, template), TWO, {"mark": "!"})
    assert trace is not None
    assert [trace.of(i) for i in range(2)] == ["hi!", "hello!"]


def test_a_template_without_a_loop_over_messages_marks_nobodys_text(tokenizer: Any) -> None:
    trace = traced(with_chat(tokenizer, "{{ messages[0]['content'] }}"), TWO, {})
    assert trace is not None
    assert trace.text == "hi"
    assert trace.parts == [[], []]


def test_what_a_template_raises_is_raised(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="not like this"):
        traced(with_chat(tokenizer, "{{ raise_exception('not like this') }}"), TWO, {})
