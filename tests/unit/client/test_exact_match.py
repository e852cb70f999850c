"""Exact match from the likeliest tokens of a loss pass, against generating every answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.client import exact_match
from fedlora.client.exact_match import Turn, exact_matches, guesses_by_turn, turns_of
from fedlora.client.generation import answers
from fedlora.data.tokenize import IGNORE
from support.tokens import CHATML, with_chat

STEPS = 4


@pytest.fixture
def llama(tiny_llama: Path) -> tuple[Any, Any]:
    """A small random model and its tokenizer of characters."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The prompts that answers are generated to."""
    prompts: list[list[int]] = []

    def noted(model: Any, tokenizer: Any, asked: list[list[int]], *others: Any) -> list[list[int]]:
        prompts.extend(asked)
        return answers(model, tokenizer, asked, *others)

    monkeypatch.setattr(exact_match, "answers", noted)
    return prompts


def greedy(model: Any, prompt: list[int], steps: int = STEPS) -> list[int]:
    """The likeliest token, step by step, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def with_guesses(model: Any, turn: Turn) -> tuple[Turn, list[int]]:
    """A turn with the likeliest tokens after the true ones."""
    ids = [*turn.prompt, *turn.reference]
    with torch.no_grad():
        likeliest = model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
    return turn, likeliest[len(turn.prompt) - 1 : -1]


def other_than(token: int) -> int:
    """A letter that is not this token."""
    return (token + 1) % 26 + 40


def test_every_learnt_run_of_a_row_is_a_turn() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [IGNORE, 2, 3, IGNORE, 5, 6]}
    assert turns_of(row) == [Turn([1], [2, 3]), Turn([1, 2, 3, 4], [5, 6])]
    assert turns_of({"input_ids": [1, 2], "labels": [IGNORE, IGNORE]}) == []


def test_guesses_are_divided_among_the_turns() -> None:
    row = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [IGNORE, 2, 3, IGNORE, 5, 6]}
    without_prompt = {"input_ids": [7, 8, 9], "labels": [7, 8, 9]}
    last = {"input_ids": [1, 5], "labels": [IGNORE, 5]}
    assert guesses_by_turn([row, without_prompt, last], [20, 30, 50, 60, 80, 90, 55]) == [
        (Turn([1], [2, 3]), [20, 30]),
        (Turn([1, 2, 3, 4], [5, 6]), [50, 60]),
        (Turn([], [7, 8, 9]), None),  # nothing predicts its first token
        (Turn([1], [5]), [55]),
    ]


def test_what_the_likeliest_tokens_decide_is_not_generated(
    llama: tuple[Any, Any], generated: list[list[int]]
) -> None:
    model, tokenizer = llama
    prompts = [tokenizer(text)["input_ids"] for text in ("abc>", "x>", "a longer question>")]
    turns = []
    for prompt in prompts:
        right = greedy(model, prompt)
        wrong = [*right[:2], other_than(right[2]), right[3]]
        turns += [Turn(prompt, right), Turn(prompt, wrong), Turn(prompt, right[:2])]
    judged = [with_guesses(model, turn) for turn in turns]
    assert exact_matches(model, tokenizer, judged, 4, STEPS) == 6
    assert generated == []
    unknown = [(turn, None) for turn in turns]
    assert exact_matches(model, tokenizer, unknown, 4, STEPS) == 6
    assert sorted(generated) == sorted(turn.prompt for turn in turns)


def test_what_they_leave_open_is_generated(
    llama: tuple[Any, Any], generated: list[list[int]]
) -> None:
    model, tokenizer = llama
    prompt = tokenizer("abc>")["input_ids"]
    right = greedy(model, prompt)
    longer = Turn(prompt, [*right, *right])  # than an answer may be
    assert exact_matches(model, tokenizer, [with_guesses(model, longer)], 4, STEPS) == 0
    assert generated == [prompt]
    # White space where another token is wanted says nothing: that token may come after it.
    spaces = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).strip()]
    space = next(i for i in spaces if i not in {right[3], *tokenizer.all_special_ids})
    asked = [(Turn(prompt, right), [*right[:3], space])]
    assert exact_matches(model, tokenizer, asked, 4, STEPS) == 1
    assert generated == [prompt, prompt]


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_that_ends_is_known(
    llama: tuple[Any, Any], generated: list[list[int]], chat: bool
) -> None:
    model, tokenizer = llama
    if chat:  # its turns end in letters, for which there is no single token
        tokenizer = with_chat(tokenizer, CHATML)
    end = tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] if chat else [2]
    a, b, *_ = tokenizer("abc", add_special_tokens=False)["input_ids"]
    prompt = tokenizer("x>")["input_ids"]
    reference = [a, b, *end]
    early = [a, *end[:1], *reference[2:]]  # the end where a letter is wanted
    late = [a, b, *([a] * len(end))]  # a letter where the end is wanted
    line_feed = tokenizer("\n", add_special_tokens=False)["input_ids"]
    after = Turn(prompt, [*reference, *line_feed])
    judged = [
        (Turn(prompt, reference), reference),
        (Turn(prompt, reference), early),
        (Turn(prompt, reference), late),
        (after, [*reference, *([a] * len(line_feed))]),  # what comes after the end counts for none
    ]
    assert [exact_matches(model, tokenizer, [x], 4, 16) for x in judged] == [1, 0, 0, 1]
    assert generated == []
