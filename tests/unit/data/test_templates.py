"""A row as a prompt and a completion, a conversation, or a text to classify."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.data.chat_messages import UnusableRowError
from fedlora.data.rendered import Chat, Classified
from fedlora.data.templates import (
    BUILT_IN_CHAT,
    TEMPLATES,
    choose_template,
    classification,
    custom,
    label_of,
)
from fedlora.errors import InputError
from support.tokens import byte_level, with_chat

HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}


def test_a_template_of_ones_own() -> None:
    template = custom("Q: {question} {{{context}}}\n", "{answer}!")
    row = {"question": "2+2", "context": None, "answer": 4}
    assert template.render(row) == ("Q: 2+2 {}\n", "4!")
    assert template.columns == (("answer",),)
    assert template.optional == ("question", "context")
    assert template.missing(["answer"]) == ["question", "context"]


@pytest.mark.parametrize(
    ("prompt", "completion", "says"),
    [
        ("{a", "{b}", "prompt_template: '{a': expected '}' before end of string"),
        ("{a:>3}", "{b}", "expected a column's name alone between braces"),
        ("{}", "{b}", "expected a column's name alone"),
        ("{a}", "b", "names no {column} to learn"),
    ],
)
def test_templates_that_cannot_be_read(prompt: str, completion: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        custom(prompt, completion)
    assert says in str(error.value)


def test_the_first_template_whose_columns_are_there() -> None:
    assert choose_template("auto", ["instruction", "response", "text"]).name == "alpaca"
    assert choose_template("auto", ["conversations"]).name == "chat"
    assert choose_template("auto", ["a", "b"], completion_template="{b}").name == "custom"


def test_a_classifiers_columns() -> None:
    pair = classification(None, None, ["premise", "hypothesis", "label"])
    row = {"premise": "a", "hypothesis": "b", "label": 2}
    assert pair.render(row) == Classified(("a", "b"), "2")
    with pytest.raises(InputError, match="text_column_names: name the text's column; the data has"):
        classification(None, None, ["body", "label"])
    with pytest.raises(InputError, match="label_column_name: 'stars' is not a column"):
        classification(["text"], "stars", ["text", "label"])


@pytest.mark.parametrize("value", [1.0, None, ["a"]])
def test_what_is_no_label(value: Any) -> None:
    with pytest.raises(InputError, match="expected text or whole numbers"):
        label_of({"label": value}, "label")


def test_conversations_with_tools_settings_and_a_prompt() -> None:
    row = {
        "prompt": [HI],
        "completion": [HELLO],
        "tools": '[{"name": "add", "note": null}]',
        "chat_template_kwargs": {"thinking": False},
    }
    extra = {"thinking": False, "tools": [{"name": "add"}]}
    assert TEMPLATES["prompt_completion"].render(row) == Chat([HI, HELLO], 1, extra)


def test_sharegpts_conversations_begin_with_a_question() -> None:
    turns = [HELLO, HELLO, HI, HELLO]
    rendered = TEMPLATES["chat"].render({"conversations": turns, "system": "be kind"})
    assert isinstance(rendered, Chat)
    assert rendered.messages == [{"role": "system", "content": "be kind"}, HI, HELLO]
    with pytest.raises(UnusableRowError, match="no assistant turn to learn"):
        TEMPLATES["chat"].render({"conversations": [HELLO, HI]})


def test_the_packages_own_chat_template() -> None:
    it = with_chat(byte_level(trained=False), BUILT_IN_CHAT["vicuna"].read_text())
    text = it.apply_chat_template([HI, HELLO], tokenize=False)
    assert text.endswith(" USER: hi ASSISTANT: hello<|endoftext|>")
