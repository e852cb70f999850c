"""Which labels a head's rows stand for, and where in a head those rows are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedlora.adapters.labels import (
    classifies,
    common_orders,
    label_names,
    label_rows,
    labels_of_head,
    named_labels,
    numbered,
)
from fedlora.adapters.saved_adapter import SavedAdapter
from fedlora.errors import InputError

TWO = {"id2label": {"0": "no", "1": "yes"}}


def classifier(source: str = "it", **given: Any) -> SavedAdapter:
    """A classifier's adapter without any factors."""
    dense = given.pop("dense", {})
    return SavedAdapter({}, dense, {"task_type": "SEQ_CLS"}, source=source, **given)


def test_names_in_the_order_of_their_ids() -> None:
    assert label_names({"id2label": {"1": "yes", "0": "no"}}) == ("no", "yes")
    assert label_names({"label2id": {"yes": 1, "no": 0}}) == ("no", "yes")
    assert label_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) is None
    assert named_labels({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) == ("0", "1")
    assert label_names(None) is None
    assert numbered(("1", "0"))
    assert not numbered(("1", "2"))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"id2label": {"0": "a", "2": "b"}},
            r"id2label numbers its 2 labels \[0, 2\]; expected 0 to 1",
        ),
        ({"id2label": {"0": "a", "1": "a"}}, "id2label names a label twice: a, a"),
        ({"id2label": ["a", "b"]}, "id2label is no object of numbers and names"),
        ({"label2id": ["a", "b"]}, "label2id is no object"),
    ],
)
def test_labels_that_cannot_be(config: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=f"^config.json: {says}"):
        named_labels(config)


def test_a_task_or_the_models_class_says_that_it_classifies() -> None:
    assert classifies(classifier())
    assert not classifies(SavedAdapter({}, {}, {"task_type": "CAUSAL_LM"}))
    config = {"architectures": ["BertForTokenClassification"]}
    assert classifies(SavedAdapter({}, {}, {}, model_config=config))
    mapping = {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}}
    assert not classifies(SavedAdapter({}, {}, mapping))


def test_the_bases_labels_count_where_the_head_has_as_many_rows() -> None:
    two_rows = classifier(dense={"score.weight": torch.zeros(2, 8)})
    three_rows = classifier(dense={"score.weight": torch.zeros(3, 8)})
    assert labels_of_head(two_rows, TWO) == ("no", "yes")
    assert labels_of_head(three_rows, TWO) is None
    assert labels_of_head(classifier(model_config=TWO), TWO) == ("no", "yes")


def test_orders_are_by_name_where_all_have_the_same_names() -> None:
    pair = [classifier("a"), classifier("b")]
    assert common_orders(pair, [("no", "yes"), ("yes", "no")]) == [("no", "yes"), ("yes", "no")]
    assert common_orders(pair, [("0", "1"), None]) is None
    with pytest.raises(InputError, match=r"b: does not say what labels .* another adapter has no"):
        common_orders(pair, [("no", "yes"), None])
    with pytest.raises(InputError, match="'yes' and 'Yes ' differ in case or white space alone"):
        common_orders(pair, [("no", "yes"), ("no", "Yes ")])


def test_rows_of_labels_are_found_in_the_last_layer() -> None:
    """A dense layer inside the head is as wide as there are labels here by chance."""
    head = {
        "classifier.dense.weight": torch.zeros(2, 2),
        "classifier.out_proj.weight": torch.zeros(2, 2),
        "classifier.out_proj.bias": torch.zeros(2),
    }
    found = label_rows(classifier(dense=head), {}, 2)
    assert found == {"classifier.out_proj.weight": 0, "classifier.out_proj.bias": 0}
