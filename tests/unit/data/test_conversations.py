"""What is learnt of a conversation: tool calls, turns left out, messages in all their spellings."""

from __future__ import annotations

import json
from typing import Any

import pytest

import fedlora
from fedlora.data.conversations import conversation
from fedlora.data.rendered import Chat
from fedlora.data.templates import TEMPLATES, UnusableRowError
from fedlora.data.tokenize import IGNORE, tokenize
from support import chat_templates
from support.tokens import (
    CHATML,
    MARKED_CHATML,
    SPECIAL,
    byte_level,
    chat,
    learnt,
    of_model,
    stretches,
    templates_compiled_once,  # noqa: F401
    turns,
    with_chat,
)
from support.tool_calls import (
    ARGUMENTS,
    CALLED,
    JSON_CALL,
    SPELLINGS,
    calls,
    talk,
)

pytestmark = pytest.mark.usefixtures("templates_compiled_once")


def of_text(template: Any) -> Any:
    """A token per byte, and the template with its special tokens."""
    source = template if isinstance(template, str) else "".join(template.values())
    special = sorted(set(SPECIAL.findall(source)) - {"<|endoftext|>", "<|startoftext|>"})
    return with_chat(byte_level(special, trained=False), template)


OTHERS: dict[str, list[str]] = {
    "MISTRAL": [
        f"[TOOL_CALLS] [{JSON_CALL}]<|endoftext|>",
        " No rain.<|endoftext|>",
        " Bye<|endoftext|>",
    ],
    "GRANITE": [
        f"<|tool_call|>[{JSON_CALL}]<|end_of_text|>",
        "No rain.<|end_of_text|>",
        "Bye<|end_of_text|>",
    ],
    "PHI4_MINI": [
        f"<|tool_call|>[{JSON_CALL}]<|/tool_call|><|end|>",
        "No rain.<|end|>",
        "Bye<|end|>",
    ],
    **{
        name: [
            f"<tool_call>{JSON_CALL}</tool_call><|im_end|>",
            "No rain.<|im_end|>",
            "Bye<|im_end|>",
        ]
        for name in ("BY_NUMBER", "IN_A_MACRO", "IN_A_BLOCK")
    },
}


@pytest.mark.parametrize("name", CALLED)
def test_tool_calls_are_learnt(name: str) -> None:
    """However they are spelled, and never what the tool answered."""
    tokenizer = of_model(name)
    for spelling, messages in SPELLINGS.items():
        assert learnt(tokenizer, chat(tokenizer, messages)) == CALLED[name], spelling
    text = tokenizer.decode(chat(tokenizer, talk())["input_ids"])
    assert "SUNNY" in text


@pytest.mark.parametrize("name", OTHERS)
def test_tool_calls_of_other_templates(name: str) -> None:
    tokenizer = of_text(getattr(chat_templates, name))
    for spelling, messages in SPELLINGS.items():
        assert learnt(tokenizer, chat(tokenizer, messages)) == OTHERS[name], spelling


def test_a_named_template_for_tools_is_taken_where_a_row_has_some() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    tokenizer = of_text(chat_templates.COMMAND_R)
    found = learnt(tokenizer, chat(tokenizer, talk(), tools=[tool]))
    assert found[0].startswith('Action: ```json\n[{\n    "name": "weather"')
    assert found[0].endswith("\n]```<|END_OF_TURN_TOKEN|>")
    assert found[1:] == ["No rain.<|END_OF_TURN_TOKEN|>", "Bye<|END_OF_TURN_TOKEN|>"]
    with pytest.raises(UnusableRowError, match="leaves the assistant's tool calls out"):
        chat(tokenizer, talk())


def test_an_empty_list_of_tool_calls_is_none() -> None:
    tokenizer = of_model("llama3_1")
    wanted = chat(tokenizer, turns("Hi", "Hello"))
    for empty in ([], None, ""):
        messages = turns("Hi", "Hello")
        messages[1]["tool_calls"] = empty
        assert chat(tokenizer, messages) == wanted


@pytest.mark.parametrize("name", ["qwen3_5_think", "llama3_1", "gptoss", "glm4moe", "qwen3"])
def test_keys_that_a_data_set_adds_change_nothing(name: str) -> None:
    """Arrow gives every message the keys of all, and every call the arguments of all."""
    from datasets import Dataset

    tokenizer = of_model(name)
    messages = talk("", "weather", absent=True)
    other = calls("clock")[0]
    other["function"]["arguments"] = {"zone": "UTC"}
    rows = [
        {"messages": messages},
        {"messages": [*turns("When?"), {"role": "assistant", "tool_calls": [other]}]},
    ]
    stored = Dataset.from_list(rows).to_list()
    for row, given in zip(rows, stored, strict=True):
        assert any(None in message.values() for message in given["messages"])
        assert tokenize(given, TEMPLATES["chat"], tokenizer, 9999, True) == tokenize(
            row, TEMPLATES["chat"], tokenizer, 9999, True
        )


def test_sharegpts_function_calls() -> None:
    tokenizer = of_model("qwen2_5")
    call = json.dumps({"name": "weather", "arguments": ARGUMENTS})
    spoken = [("human", "Rain?"), ("function_call", call), ("observation", "SUNNY")]
    spoken += [("gpt", "No rain."), ("human", "Thanks"), ("gpt", "Bye")]
    row = {"conversations": [{"from": who, "value": text} for who, text in spoken]}
    found = tokenize(row, TEMPLATES["chat"], tokenizer, 9999, True)
    assert found == chat(tokenizer, talk())
    row["conversations"][1]["value"] = "no JSON"
    found = tokenize(row, TEMPLATES["chat"], tokenizer, 9999, True)
    assert learnt(tokenizer, found)[0] == "no JSON<|im_end|>"


def test_content_in_parts_is_their_text() -> None:
    """As OpenAI writes it, in every role; what is no text drops the row."""

    def parts(*texts: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": text} for text in texts]

    tokenizer = of_text(CHATML)
    talk = [
        {"role": "system", "content": parts("Be ", "kind.")},
        {"role": "user", "content": parts("Hi", " there")},
        {"role": "assistant", "content": parts("Hel", "lo")},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": parts("Bye")},
    ]
    texts = ["Be kind.", "Hi there", "Hello", "And?", "Bye"]
    plain = [{**turn, "content": text} for turn, text in zip(talk, texts, strict=True)]
    wanted = tokenize({"messages": plain}, TEMPLATES["chat"], tokenizer, 999, True)
    assert tokenize({"messages": talk}, TEMPLATES["chat"], tokenizer, 999, True) == wanted
    talk[1]["content"] = [*parts("Hi"), {"type": "image", "text": None}]
    with pytest.raises(UnusableRowError, match="a part that is no text: image"):
        tokenize({"messages": talk}, TEMPLATES["chat"], tokenizer, 999, True)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_turns_may_be_given_as_json_text(column: str) -> None:
    """As a CSV file holds them."""
    keys = ("role", "content") if column == "messages" else ("from", "value")
    said = [("user", "Hi"), ("assistant", "Hello"), ("user", "Rain?"), ("assistant", "No.")]
    talk = [dict(zip(keys, turn, strict=True)) for turn in said]
    tokenizer = of_text(CHATML)
    wanted = tokenize({column: talk}, TEMPLATES["chat"], tokenizer, 999, True)
    row = {column: json.dumps(talk)}
    assert tokenize(row, TEMPLATES["chat"], tokenizer, 999, True) == wanted
    with pytest.raises(fedlora.InputError, match="chat is no JSON"):
        tokenize({column: "[{"}, TEMPLATES["chat"], tokenizer, 999, True)


@pytest.mark.parametrize(
    ("spoken", "text"), [("role", "value"), ("role", "content"), ("from", "value")]
)
@pytest.mark.parametrize("speakers", [("human", "gpt"), ("user", "assistant"), ("user", "model")])
def test_speakers_have_many_names(spoken: str, text: str, speakers: tuple[str, str]) -> None:
    tokenizer, said = of_text(CHATML), ["Hi", "Hello", "Rain?", "No."]
    usual = [
        {"role": role, "content": x}
        for role, x in zip(["user", "assistant"] * 2, said, strict=True)
    ]
    wanted = tokenize({"messages": usual}, TEMPLATES["chat"], tokenizer, 999, True)
    talk = [{spoken: who, text: x} for who, x in zip(speakers * 2, said, strict=True)]
    assert tokenize({"messages": talk}, TEMPLATES["chat"], tokenizer, 999, True) == wanted


def test_a_system_column_is_the_first_turn() -> None:
    tokenizer = with_chat(byte_level(["<|im_start|>", "<|im_end|>"]), CHATML)
    spoken = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    wanted = chat(tokenizer, turns("hi", "hello", system="Be kind."))
    for key, value in (("conversations", spoken), ("messages", turns("hi", "hello"))):
        row = {key: value, "system": "Be kind."}
        assert tokenize(row, TEMPLATES["chat"], tokenizer, 999, True) == wanted
        for nothing in (None, "", float("nan")):
            row["system"] = nothing
            found = tokenize(row, TEMPLATES["chat"], tokenizer, 999, True)
            assert found == chat(tokenizer, turns("hi", "hello"))
    # One that the conversation has goes before it, as in LLaMA-Factory.
    row = {"messages": turns("hi", "hello", system="Be kind."), "system": "Be brief."}
    assert tokenize(row, TEMPLATES["chat"], tokenizer, 999, True) == wanted


OFF = ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}, {"train": "false"})


OFF += ({"loss": False},)


ON = ({"weight": 1}, {"weight": 1.0}, {"train": True}, {"training": True}, {"weight": None})


ON += ({"weight": float("nan")}, {"loss": True})


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML, "qwen3", "glm4moe", "llama3_1"])
def test_turns_of_weight_zero_are_left_out_of_the_loss(template: str) -> None:
    tokenizer = of_model(template) if template.isidentifier() else of_text(template)
    whole = chat(tokenizer, turns("hi", "hello", "and?", "bye"))
    first, last = stretches(whole)
    for said in OFF:
        for left, kept in ((1, last), (3, first)):
            messages = turns("hi", "hello", "and?", "bye")
            messages[left].update(said)
            found = chat(tokenizer, messages)
            assert found["input_ids"][: len(whole["input_ids"]) - 1] == whole["input_ids"][:-1] or (
                found["input_ids"] == whole["input_ids"][: len(found["input_ids"])]
            )
            assert stretches(found) == [kept]
    for said in ON:
        messages = turns("hi", "hello", "and?", "bye")
        messages[1].update(said)
        assert chat(tokenizer, messages) == whole


def test_weights_where_everything_or_a_completion_is_learnt() -> None:
    tokenizer = of_text(CHATML)
    messages = turns("hi", "hello", "and?", "bye")
    messages[1]["weight"] = 0
    everything = tokenize({"messages": messages}, TEMPLATES["chat"], tokenizer, 999, False)
    [first, _] = stretches(chat(tokenizer, turns("hi", "hello", "and?", "bye")))
    out = [i for i, label in enumerate(everything["labels"]) if label == IGNORE]
    assert out == list(range(first[0], first[0] + len(first[1])))
    row = {"prompt": messages[:1], "completion": messages[1:]}
    found = tokenize(row, TEMPLATES["prompt_completion"], tokenizer, 999, True)
    assert learnt(tokenizer, found)[-1].endswith("bye<|im_end|>\n")
    assert "hello" not in "".join(learnt(tokenizer, found))


@pytest.mark.parametrize("key", ["weight", "train"])
def test_rows_of_which_nothing_is_learnt_are_dropped(key: str) -> None:
    tokenizer = of_text(CHATML)
    messages = turns("hi", "hello")
    messages[1][key] = 0
    for template, row in (
        ("chat", {"messages": messages}),
        ("prompt_completion", {"prompt": messages[:1], "completion": messages[1:]}),
    ):
        with pytest.raises(UnusableRowError, match="no assistant turn to learn: all have weight 0"):
            tokenize(row, TEMPLATES[template], tokenizer, 999, True)


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"weight": 0.5}, "a turn's weight is 0.5; expected 1 or true"),
        ({"weight": 2}, "a turn's weight is 2"),
        ({"train": "perhaps"}, "a turn's train is 'perhaps'"),
        ({"weight": [0]}, r"a turn's weight is \[0\]"),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail: parts of a turn cannot"),
    ],
)
def test_other_weights_are_refused(said: dict[str, Any], says: str) -> None:
    messages = turns("hi", "hello")
    messages[1].update(said)
    with pytest.raises(fedlora.InputError, match=says):
        chat(of_text(CHATML), messages)


@pytest.mark.parametrize(
    ("template", "error", "says"),
    [
        ("{% for m in messages %}", fedlora.InputError, "the chat template is malformed, line 1"),
        ("{{ nothing.at.all }}", UnusableRowError, "refuses it: 'nothing' is undefined"),
        ("{{ 1 + messages }}", UnusableRowError, "fails on it: TypeError"),
        ("{{ 1 / 0 }}", UnusableRowError, "fails on it: ZeroDivisionError"),
        ("{{ messages[99].content }}", UnusableRowError, "has no element 99"),
        ("{% for i in range(10**9) %}{% endfor %}", UnusableRowError, "fails on it: Overflow"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", UnusableRowError, "Recursion"),
        ("constant", UnusableRowError, "leaves an assistant turn's text out"),
        ("{{ messages[1].content }}", UnusableRowError, "not go through the messages one by one"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", UnusableRowError, "text out"),
    ],
)
def test_templates_that_fail_say_why(template: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        chat(with_chat(byte_level(), template), turns("hi", "hello"))


def test_a_conversation_is_its_rendered_text_token_by_token() -> None:
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = with_chat(byte_level(special, trained=False), CHATML)
    chat = Chat(turns("hi", "hello"))
    text = tokenizer.apply_chat_template(chat.messages, tokenize=False)
    ids, learnt = conversation(chat, tokenizer, True)
    assert tokenizer.decode(ids).startswith(text)
    kept = [token for token, learn in zip(ids, learnt, strict=True) if learn]
    assert tokenizer.decode(kept).startswith("hello<|im_end|>")
    everything, all_learnt = conversation(chat, tokenizer, False)
    assert tokenizer.decode(everything).startswith(text)
    assert all(all_learnt)
    with pytest.raises(fedlora.InputError, match="chat"):
        conversation(chat, byte_level(trained=False), True)
