"""Classifiers' last layers meet label by label; tests/runs/test_heads_by_label.py has PEFT's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedlora.adapters.heads import combine_heads
from fedlora.adapters.labels import label_names
from fedlora.adapters.saved_adapter import SavedAdapter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_names_of_labels() -> None:
    assert label_names({"id2label": {"1": "yes", "0": "no"}}) == ("no", "yes")
    assert label_names({"label2id": {"yes": 1, "no": 0}}) == ("no", "yes")
    assert label_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) is None
    assert label_names({}) is label_names(None) is None


def test_rows_of_one_label_meet_wherever_they_stand() -> None:
    """The result has the first adapter's order, and each label's mean over those that have it."""

    def head(*labels: str, rows: Sequence[float]) -> SavedAdapter:
        config = {"id2label": {str(i): name for i, name in enumerate(labels)}}
        weight = torch.tensor(rows)[:, None].expand(len(rows), 3).clone()
        dense = {"score.weight": weight}
        return SavedAdapter({}, dense, {"task_type": "SEQ_CLS"}, model_config=config)

    one, other = head("no", "yes", rows=[1.0, 2.0]), head("yes", "perhaps", rows=[6.0, 5.0])
    heads = combine_heads([one, other], [0.75, 0.25])
    assert heads.labels == ("no", "yes", "perhaps")
    assert heads.dense["score.weight"][:, 0].tolist() == [1.0, 3.0, 5.0]
