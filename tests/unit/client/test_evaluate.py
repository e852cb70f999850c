"""Held-out metrics against transformers' own loss and generation, one unpadded row at a time."""

from __future__ import annotations

from fedlora.client.evaluate import has_prompts, references_fit
from fedlora.data.tokenize import IGNORE, Tokens


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
