"""Preference data: texts and conversations, in the forms that people have them."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.data.chat_messages import UnusableRowError
from fedlora.data.preferences import preference_of, with_answers
from fedlora.data.rendered import Chat, Preference
from fedlora.data.templates import choose_template
from fedlora.errors import InputError

ASKED = {"role": "user", "content": "2+2?"}
GOOD = {"role": "assistant", "content": "4"}
BAD = {"role": "assistant", "content": "5"}
CHATS = Preference(Chat([ASKED, GOOD], 1, {}), Chat([ASKED, BAD], 1, {}))
SHAREGPT = {
    "conversations": [{"from": "human", "value": "2+2?"}],
    "chosen": {"from": "gpt", "value": "4"},
    "rejected": {"from": "gpt", "value": "5"},
}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "2+2?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": [ASKED], "chosen": "4", "rejected": "5"},
        {"prompt": None, "chosen": GOOD, "rejected": BAD, "conversations": [ASKED]},
        SHAREGPT,
    ],
)
def test_conversations(row: dict[str, Any]) -> None:
    assert preference_of(row) == CHATS


def test_texts() -> None:
    row = {"prompt": "2+2? ", "chosen": "4", "rejected": 5}
    assert preference_of(row) == Preference(("2+2? ", "4"), ("2+2? ", "5"))
    alike = {"chosen": "Human: 2+2? Assistant: four", "rejected": "Human: 2+2? Assistant: five"}
    before = "Human: 2+2? Assistant: f"
    assert preference_of(alike) == Preference((before, "our"), (before, "ive"))
    words = {"chosen": "Say a number: one", "rejected": "Say a number: two"}
    assert preference_of(words).chosen == ("Say a number:", " one")


def test_a_system_prompt_stands_before_all() -> None:
    chosen = preference_of({**SHAREGPT, "system": "be kind"}).chosen
    assert isinstance(chosen, Chat)
    assert chosen.messages[0] == {"role": "system", "content": "be kind"}
    assert chosen.prompt == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "yes", "rejected": "no"}, "preference needs a prompt: the column prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "preference needs a prompt"),
        ({"prompt": "x", "chosen": [GOOD], "rejected": "5"}, "one of chosen and rejected is text"),
        ({"prompt": ["2+2?"], "chosen": "4", "rejected": "5"}, "a list of turns"),
    ],
)
def test_what_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        preference_of(row)


def test_equal_answers_are_dropped() -> None:
    with pytest.raises(UnusableRowError, match="chosen and rejected are the same"):
        preference_of({"prompt": "2+2?", "chosen": "4", "rejected": "4"})


def test_missing_columns_are_named() -> None:
    with pytest.raises(InputError, match="preference needs the column rejected; the data has"):
        choose_template("preference", ["prompt", "chosen"])
    with pytest.raises(InputError, match=r"no template fits.*preference \(chosen, rejected\)"):
        choose_template("auto", ["prompt", "chosen"])


def test_the_columns_tell_preference_data() -> None:
    assert choose_template("auto", list(SHAREGPT)).name == "preference"
    assert choose_template("auto", ["prompt", "chosen", "rejected"]).name == "preference"


def test_a_training_of_ones_own_finds_both_answers_in_the_form_of_trl() -> None:
    tokens = {"input_ids": [1, 2], "labels": [-100, 2]}
    texts = Preference(("2+2? ", "4"), ("2+2? ", "5"))
    extra = {"tools": [{"name": "add"}], "enable_thinking": False}
    with_tools = Preference(Chat([ASKED, GOOD], 1, extra), Chat([ASKED, BAD], 1, extra))
    out = with_answers(
        [texts, CHATS, with_tools, texts, ("a", "b")], [*[tokens] * 3, "too long", tokens]
    )
    assert out[0] == {**tokens, "prompt": "2+2? ", "chosen": "4", "rejected": "5"}
    assert out[1] == {**tokens, "prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}
    assert out[2] == {
        **out[1],  # type: ignore[dict-item]
        "tools": [{"name": "add"}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert out[3:] == ["too long", tokens]
