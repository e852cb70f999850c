"""The form in which a chat template shows the assistant's tool calls."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.data.chat_messages import UnusableRowError
from fedlora.data.rendered import Chat
from fedlora.data.tool_calls import accepted_form
from support.tokens import byte_level, turns, with_chat

ARGUMENTS = {"x": 1}
AS_JSON = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}{% endfor %}"
)
AS_TEXT = AS_JSON.replace(" | tojson", " + ''")
NEEDS_CONTENT = AS_JSON.replace("{{ m.content }}", "{{ m['content'] + '' }}")
NO_CALLS = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token per byte."""
    return byte_level(trained=False)


def calling(arguments: Any = None, **more: Any) -> Chat:
    """A question, and an answer that calls `add`."""
    call = {"type": "function", "function": {"name": "add", "arguments": arguments or ARGUMENTS}}
    return Chat([*turns("hi"), {"role": "assistant", "tool_calls": [call], **more}])


def shown(chat: Chat, template: str, tokenizer: Any) -> str:
    """What the template writes for the call."""
    _, trace = accepted_form(chat, with_chat(tokenizer, template))
    assert trace is not None
    return trace.of(1)


def test_without_calls_nothing_is_tried(tokenizer: Any) -> None:
    chat = Chat(turns("hi", "hello"))
    assert accepted_form(chat, with_chat(tokenizer, "{{ raise_exception('no') }}")) == (chat, None)


@pytest.mark.parametrize("given", [ARGUMENTS, '{"x": 1}'])
@pytest.mark.parametrize("template", [AS_JSON, AS_TEXT])
def test_arguments_become_what_the_template_takes(
    given: Any, template: str, tokenizer: Any
) -> None:
    assert shown(calling(given), template, tokenizer) == '[add {"x": 1}]'


def test_content_is_added_where_the_template_needs_some(tokenizer: Any) -> None:
    assert shown(calling(), NEEDS_CONTENT, tokenizer) == '[add {"x": 1}]'
    assert shown(calling(content="hm"), NEEDS_CONTENT, tokenizer) == 'hm[add {"x": 1}]'


def test_calls_that_no_form_shows(tokenizer: Any) -> None:
    with pytest.raises(UnusableRowError, match="leaves the assistant's tool calls out"):
        accepted_form(calling(content=""), with_chat(tokenizer, NO_CALLS))
    assert shown(calling(content="hm"), NO_CALLS, tokenizer) == "hm"  # it says something else


def test_the_first_complaint_is_raised_where_no_form_is_taken(tokenizer: Any) -> None:
    template = "{{ raise_exception('no ' + (messages[1].tool_calls | length | string)) }}"
    with pytest.raises(Exception, match="no 1"):
        accepted_form(calling(), with_chat(tokenizer, template))
