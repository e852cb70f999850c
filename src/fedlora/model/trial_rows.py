"""Makes random rows on which it is tried out how a model can be run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fedlora.data.tokenize import Tokens

LENGTHS = (7, 9, 12)
"""Tokens of the samples that are tried: two of them are padded to one length inside attention."""


def random_rows(
    model: Any, padding: int, classifier: bool, lengths: Sequence[int] = LENGTHS, seed: int = 0
) -> list[Tokens]:
    """Random samples of these lengths, whose tokens are all labels and never padding."""
    vocabulary = vocabulary_size(model)
    source = torch.Generator().manual_seed(seed)
    rows: list[Tokens] = []
    for length in lengths:
        ids = torch.randint(vocabulary, (length,), generator=source).tolist()
        ids = [i if i != padding else (i + 1) % vocabulary for i in ids]
        if classifier:
            rows.append({"input_ids": ids, "label": 0})
        else:
            rows.append({"input_ids": ids, "labels": ids})
    return rows


def vocabulary_size(model: Any) -> int:
    """Tokens that can be read and, in a language model, predicted."""
    read: int = model.get_input_embeddings().num_embeddings
    head = model.get_output_embeddings()
    written = getattr(getattr(head, "weight", None), "shape", (read,))[0]
    return min(read, written)
