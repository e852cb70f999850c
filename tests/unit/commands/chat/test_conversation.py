"""A conversation remembers its turns within the context, in the form the model was trained on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.client.generation import generate
from fedlora.commands.chat.conversation import Conversation, Style, style_of

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def subject(template: str | None) -> Any:
    """A run that was trained on rows of this template; None: no run."""
    config = SimpleNamespace(
        template=template, prompt_template="Q: {q} A: ", completion_template="{a}"
    )
    return SimpleNamespace(of_a_run=template is not None, config=config, name="out")


TURNS = [
    {"role": "user", "content": "abc"},
    {"role": "assistant", "content": "d"},
    {"role": "user", "content": "xyz"},
]


@pytest.mark.parametrize(
    ("template", "chat_template", "asked_for", "text"),
    [
        ("chat", CHAT, False, "<user>abc<assistant>d<user>xyz<assistant>"),
        ("preference", CHAT, False, "<user>abc<assistant>d<user>xyz<assistant>"),
        (None, CHAT, False, "<user>abc<assistant>d<user>xyz<assistant>"),
        ("custom", CHAT, True, "<user>abc<assistant>d<user>xyz<assistant>"),
        ("custom", CHAT, False, "Q: xyz A: "),
        ("prompt_completion", None, False, "xyz"),
        ("preference", None, False, "xyz"),
        (None, None, False, "xyz"),
    ],
)
def test_the_form_is_that_of_the_training(
    template: str | None, chat_template: str | None, asked_for: bool, text: str, tokenizer: Any
) -> None:
    tokenizer.chat_template = chat_template
    style = style_of(subject(template), tokenizer, asked_for)
    chats = text.startswith("<")
    ids = tokenizer(text, add_special_tokens=not chats)["input_ids"]
    expected = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
    assert style.tokens(TURNS) == expected
    assert style.remembers == chats


def test_alpacas_turns(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    style = style_of(subject("alpaca"), tokenizer)
    assert style.name == "Alpaca's prompt, as in training"
    assert style.remembers


def by_letters(turns: list[dict[str, str]]) -> list[int]:
    return [3 + ord(letter) % 20 for turn in turns for letter in turn["content"]]


def talk(model: Any, tokenizer: Any, **more: Any) -> Conversation:
    tokenizer.chat_template = None
    values = {"context": 64, "max_new_tokens": 8, **more}
    return Conversation(model, tokenizer, Style(by_letters, "letters"), **values)


def test_answers_are_those_of_generate_piece_by_piece(model: Any, tokenizer: Any) -> None:
    conversation, pieces = talk(model, tokenizer), list[str]()
    answer = conversation.answer("abc", pieces.append)
    prompt = by_letters([{"content": "abc"}])
    assert answer == "".join(pieces) == generate(model, tokenizer, [prompt], 8)[0]
    assert conversation.turns == [
        {"role": "user", "content": "abc"},
        {"role": "assistant", "content": answer},
    ]
    conversation.answer("xyz", pieces.append)
    assert len(conversation.turns) == 4
    conversation.reset()
    assert conversation.turns == []


def test_an_answer_that_is_ended_is_remembered_as_far_as_it_went(
    model: Any, tokenizer: Any
) -> None:
    conversation = talk(model, tokenizer)
    told: list[str] = []

    def interrupt(piece: str) -> None:
        told.append(piece)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.answer("abc", interrupt)
    assert len(told) == 1
    assert conversation.turns[-1] == {"role": "assistant", "content": told[0]}


def test_a_message_that_is_refused_is_forgotten(model: Any, tokenizer: Any) -> None:
    def refuse(turns: list[dict[str, str]]) -> list[int]:
        raise ValueError("no")

    conversation = Conversation(model, tokenizer, Style(refuse, "none"), 64, 8)
    with pytest.raises(ValueError, match="no"):
        conversation.answer("abc", print)
    assert conversation.turns == []


def test_the_earliest_turns_make_room(model: Any, tokenizer: Any) -> None:
    seen: list[int] = []

    def tokens(turns: list[dict[str, str]]) -> list[int]:
        seen.append(len(turns))
        return by_letters(turns)

    conversation = talk(model, tokenizer, system="be kind")
    conversation.style = Style(tokens, "letters")
    conversation.turns = [
        {"role": ("user", "assistant")[i % 2], "content": letter * 15}
        for i, letter in enumerate("abcd")
    ]
    conversation.answer("e" * 15, lambda piece: None)
    assert seen == [6, 4], "the system's and the user's stay, the first two are left out"
    assert conversation.forgotten == 2
    assert [turn["content"][:1] for turn in conversation.turns[:3]] == ["c", "d", "e"]


def test_a_message_that_is_too_long_loses_its_beginning(model: Any, tokenizer: Any) -> None:
    conversation = talk(model, tokenizer)
    conversation.answer("e" * 200, lambda piece: None)
    assert conversation.forgotten == 0


def test_draws(model: Any, tokenizer: Any) -> None:
    def said(seed: int) -> str:
        torch.manual_seed(seed)
        return talk(model, tokenizer, temperature=5.0).answer("abc", lambda piece: None)

    assert said(1) == said(1)
    assert len({said(seed) for seed in range(4)}) > 1
