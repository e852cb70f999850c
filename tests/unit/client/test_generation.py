"""Greedy answers: where they stop, and in which batches they are what they are alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.client.generation import (
    PADDED,
    Ends,
    batching,
    ends_of,
    generate,
)
from support.tokens import CHATML, with_chat


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> tuple[Any, Any]:
    """A small random model and its tokenizer of characters."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_llama)


def greedy(model: Any, prompt: list[int], steps: int) -> list[int]:
    """The likeliest token, step by step, without a cache."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_what_ends_an_answer(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    assert ends_of(model, tokenizer) == Ends(frozenset({2}))
    # The tokenizer has no token for the template's end of a turn, so it is written in letters.
    assert ends_of(model, with_chat(tokenizer, CHATML)) == Ends(frozenset({2}), "<|im_end|>")
    broken = with_chat(tokenizer, "{{ raise_exception('no') }}")
    assert ends_of(model, broken) == Ends(frozenset({2}))


def test_answers_of_a_batch_are_those_of_single_prompts(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    prompts = [tokenizer(text)["input_ids"] for text in ("abc>", "a longer question>", "x>")]
    wanted = []
    for prompt in prompts:
        ids = greedy(model, prompt, 6)
        ids = ids[: ids.index(2)] if 2 in ids else ids
        wanted.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert generate(model, tokenizer, prompts, 6) == wanted
    assert batching(model, tokenizer, 24) == PADDED
