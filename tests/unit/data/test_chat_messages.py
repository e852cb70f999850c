"""Turns of a conversation, whoever wrote them down, in the form of chat templates."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.data.chat_messages import UnusableRowError, json_of, messages_of, says, without_empty
from fedlora.errors import InputError

CALLS = [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "human", "value": "hi"}, {"role": "user", "content": "hi"}),
        ({"role": "gpt", "value": "hi"}, {"role": "assistant", "content": "hi"}),
        ({"role": "tool", "content": "3"}, {"role": "tool", "content": "3"}),
        ({"role": "user", "content": None, "name": None}, {"role": "user", "content": ""}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
            {"role": "user", "content": "ab"},
        ),
        (
            {"from": "function_call", "value": '{"name": "add"}'},
            {
                "role": "assistant",
                "tool_calls": CALLS,
            },
        ),
        (
            {"role": "assistant", "content": "x", "function_call": {"name": "add"}},
            {
                "role": "assistant",
                "content": "x",
                "tool_calls": CALLS,
            },
        ),
    ],
)
def test_a_turn_in_the_form_of_templates(turn: dict[str, Any], message: dict[str, Any]) -> None:
    assert messages_of([turn]) == ([message], [False])


def test_only_the_assistants_turns_are_left_out_of_the_loss() -> None:
    given = [
        {"role": "user", "content": "a", "weight": 0},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "assistant", "content": "c", "train": True},
    ]
    messages, left_out = messages_of(given)
    assert left_out == [False, True, False]
    assert all("weight" not in message and "train" not in message for message in messages)


@pytest.mark.parametrize(
    ("turns", "error", "says"),
    [
        ("hello", InputError, "chat needs a list of turns"),
        ([{"text": "a"}], InputError, "in every turn; got text"),
        ([{"from": "narrator", "value": "a"}], UnusableRowError, "unknown speaker 'narrator'"),
        ([{"role": 3, "content": "a"}], UnusableRowError, "a turn's role is not text"),
        ([{"role": "user", "content": 3}], UnusableRowError, "a turn's content is not text"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            UnusableRowError,
            "a part that is no text: image",
        ),
        ([{"role": "assistant", "tool_calls": [3]}], UnusableRowError, "no list of calls"),
        ([{"role": "assistant", "content": "a", "weight": 0.5}], InputError, "expected 1 or true"),
    ],
)
def test_what_are_no_turns(turns: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        messages_of(turns)


def test_empty_keys_are_dropped_however_deep() -> None:
    given = {"a": None, "b": {"c": None, "d": [{"e": None, "f": 0}]}}
    assert without_empty(given) == {"b": {"d": [{"f": 0}]}}
    assert says({"content": "", "reasoning_content": "hm"})
    assert not says({"content": "", "tool_calls": []})


def test_json_in_a_column() -> None:
    assert json_of("tools", '[{"x": NaN}]') == [{"x": None}]
    with pytest.raises(InputError, match=r"template: tools is no JSON: .*'{x}'"):
        json_of("tools", "{x}")
