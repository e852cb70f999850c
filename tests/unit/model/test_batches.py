"""Tensors of tokenised rows: padding, masks, and where a loss is taken."""

from __future__ import annotations

from typing import Any

import torch

from fedlora.model.batches import collate, count_labelled, flatten_rows

ROWS: Any = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [8, 9], "labels": [8, -100]},
]
CLASSIFIED: Any = [
    {"input_ids": [5, 6], "token_type_ids": [0, 1], "label": 2},
    {"input_ids": [7], "token_type_ids": [1], "label": 0},
]


def test_a_first_token_is_never_predicted_and_does_not_count() -> None:
    assert count_labelled(ROWS) == 2
    assert count_labelled(ROWS[1:]) == 0
    assert count_labelled(CLASSIFIED) == 2
    assert count_labelled([]) == 0


def test_rows_are_padded_on_the_right() -> None:
    batch = collate(ROWS, pad_token_id=1)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert {x.dtype for x in batch.values()} == {torch.long}


def test_a_classifiers_rows_have_one_label_each_and_keep_their_segments() -> None:
    batch = collate(CLASSIFIED)
    assert batch["labels"].tolist() == [2, 0]
    assert batch["token_type_ids"].tolist() == [[0, 1], [1, 0]]


def test_without_padding_every_label_stands_before_its_token() -> None:
    ids, places, labels = flatten_rows(ROWS, torch.device("cpu"))
    assert ids.tolist() == [5, 6, 7, 8, 9]
    # Tokens 6 and 7 of the first row are predicted at the places of 5 and 6. The 8 that begins the
    # second row is not predicted at the end of the first.
    assert places.tolist() == [0, 1]
    assert labels.tolist() == [6, 7]
