"""Held-out metrics against transformers' own loss and generation, one unpadded row at a time."""

from __future__ import annotations

from fedlora.client.evaluate import evaluate, has_prompts, references_fit
from fedlora.data.tokenize import IGNORE, Tokens
from fedlora.model.base import BaseModel
from support.evaluate import (
    base,  # noqa: F401
    by_row,
    data_of,
)


def test_references_fit() -> None:
    def row(prompt: int, reference: int) -> Tokens:
        return {
            "input_ids": list(range(prompt + reference)),
            "labels": [IGNORE] * prompt + list(range(reference)),
        }

    assert references_fit([row(3, 4), row(1, 1)], 4)
    assert not references_fit([row(3, 4), row(3, 5)], 4)
    assert not references_fit([row(3, 4), row(0, 4)], 4)  # no prompt to answer
    assert not references_fit([row(3, 0)], 4)
    assert not references_fit([], 4)
    assert has_prompts([row(3, 4), row(1, 9)])
    assert not has_prompts([row(3, 4), row(0, 4)])


def test_the_mean_is_over_tokens_not_rows(base: BaseModel) -> None:
    """A long row counts for more than a short one; the two means differ here."""
    data = data_of(base)
    per_row = sum(by_row(base, [row])[0] for row in data) / len(data)
    found = evaluate(base.model, base.tokenizer, data, batch_size=4)["loss"]
    assert abs(found - per_row) > 2e-4
