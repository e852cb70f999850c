"""What is measured of a model is what its rows give one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from fedlora.client.evaluate import evaluate
from fedlora.client.generation import generate
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.lowrank import LowRank
from fedlora.model.base import BaseModel
from support.evaluate import (
    base,  # noqa: F401
    by_row,
    data_of,
)


@pytest.mark.parametrize("completion_only", [True, False])
def test_metrics_are_those_of_single_rows(base: BaseModel, completion_only: bool) -> None:
    data = data_of(base, completion_only)
    # Make some tokens the likely ones, so that the accuracy is neither 0 nor 1.
    for row in data:
        with torch.no_grad():
            likely = base.model(input_ids=torch.tensor([row["input_ids"]])).logits[0].argmax(-1)
        row["labels"][-1] = int(likely[-2])
    loss, accuracy = by_row(base, data)
    assert 0 < accuracy < 1
    for size in (1, 2, 4, 32):
        found = evaluate(base.model, base.tokenizer, data, batch_size=size)
        assert set(found) == {"loss", "perplexity", "token_accuracy"}
        assert found["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert found["token_accuracy"] == accuracy


def test_dropout_is_off(base: BaseModel) -> None:
    data = data_of(base)
    fresh = {
        name: LowRank(torch.ones(1, n), torch.ones(m, 1))
        for name, (m, n) in base.targets.shapes.items()
    }
    base.load([], fresh, dropout=0.5)
    base.model.train()
    first, second = (
        evaluate(base.model, base.tokenizer, data, batch_size=4)["loss"] for _ in range(2)
    )
    assert first == second


def answer_of(base: BaseModel, prompt: Sequence[int], number: int) -> list[int]:
    """What transformers generates greedily after one unpadded prompt, end included."""
    ids = torch.tensor([list(prompt)])
    out = base.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=number,
        do_sample=False,
        pad_token_id=base.tokenizer.pad_token_id,
        eos_token_id=base.tokenizer.eos_token_id,
    )
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


def prompts_of(base: BaseModel) -> list[list[int]]:
    """Tokenised prompts of nine lengths."""
    texts = [f"{'abcdefgh'[i % 8] * (1 + i % 3)} why {'z' * i}>" for i in range(9)]
    return [base.tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("with_its_end", [False, True])
def test_padding_does_not_change_what_is_generated(base: BaseModel, with_its_end: bool) -> None:
    """Also for a tokenizer that pads with its end-of-text token, as those without padding do."""
    if with_its_end:
        base.tokenizer.pad_token = base.tokenizer.eos_token
    prompts = prompts_of(base)
    wanted = [
        base.tokenizer.decode(answer_of(base, prompt, 6), skip_special_tokens=True).strip()
        for prompt in prompts
    ]
    assert len(set(wanted)) > 3  # different prompts, different answers
    assert generate(base.model, base.tokenizer, prompts, 6) == wanted


def test_exact_match_counts_what_single_rows_generate(base: BaseModel) -> None:
    """Four of nine references are what the model says, one of those with a space around it."""
    data: list[Tokens] = []
    space = base.tokenizer.get_vocab()[" "]
    for i, prompt in enumerate(prompts_of(base)):
        answer = answer_of(base, prompt, 6)
        if i in (1, 4, 6):
            reference = answer
        elif i == 7:
            reference = [space, *answer, space]
        else:
            reference = [answer[0] + 1 if answer[0] < 90 else 10, *answer[1:]]
        if reference[-1] != base.tokenizer.eos_token_id:
            reference = [*reference, base.tokenizer.eos_token_id]
        data.append(
            {"input_ids": [*prompt, *reference], "labels": [IGNORE] * len(prompt) + reference}
        )
    for size in (1, 2, 4, 32):
        found = evaluate(
            base.model,
            base.tokenizer,
            data,
            batch_size=size,
            exact_match=True,
            max_new_tokens=6,
        )
        assert found["exact_match"] == 4 / 9
