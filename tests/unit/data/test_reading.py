"""By which template rows are read, and which labels there are."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.data.raw_data import RawData
from fedlora.data.reading import find_labels, is_classification, template_of, without_column
from fedlora.data.rows import Rows
from fedlora.errors import InputError


def raw(*clients: Rows, evaluation: Rows | None = None, own_files: bool = True) -> RawData:
    """Rows of clients."""
    number = 0
    numbers = []
    for rows in clients:
        numbers.append([number + i + 1 for i in range(len(rows))])
        number += len(rows)
    names = [f"part_{i}.json" for i in range(len(clients))]
    return RawData(list(clients), names, evaluation or [], "data", None if own_files else numbers)


def labelled(*labels: Any) -> Rows:
    """Texts with these labels."""
    return [{"text": "x", "label": label} for label in labels]


def test_the_settings_alone_may_say_that_it_classifies() -> None:
    assert not is_classification("auto", None, "auto")
    assert is_classification("SEQ_CLS", None, "auto")
    assert is_classification("auto", "label", "auto")
    assert is_classification("auto", None, "classification")


def test_the_evaluation_needs_the_columns_of_the_training() -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    assert template_of(Config(), raw(rows, evaluation=rows), False).name == "prompt_completion"
    with pytest.raises(InputError, match=r"the evaluation data: .* needs the column completion"):
        template_of(Config(), raw(rows, evaluation=[{"prompt": "a"}]), False)


def test_one_empty_row_is_a_mistake_and_a_file_of_them_a_client_less() -> None:
    good, bad = {"text": "a", "id": 1}, {"text": None, "id": 2}
    mixed = raw([good, bad])
    with pytest.raises(InputError, match=r"part_0\.json, row 2 has no text"):
        template_of(Config(), mixed, False)
    without = raw([good], [bad, bad])
    template = template_of(Config(), without, False)
    assert without_column(without, template) == {1: "it has no text"}
    # In one data set the same rows are single mistakes, whoever got them.
    assert without_column(raw([good], [bad], own_files=False), template) == {}


def test_labels_come_in_natural_order_or_as_they_are_named() -> None:
    data = raw(labelled("10", "9"), evaluation=labelled("1"))
    template = template_of(Config(), data, True)
    assert find_labels(data, template, None) == ["1", "9", "10"]
    assert find_labels(data, template, ["9", "1", "10"]) == ["9", "1", "10"]


@pytest.mark.parametrize(
    ("rows", "keys", "says"),
    [
        (labelled("a", "a"), {}, r"label has one value \(a\) in all 2 training rows"),
        (
            labelled(*map(str, range(101))),
            {},
            "label has 101 different values in 101 rows; these are no classes",
        ),
        (
            labelled("a", "b"),
            {"label_names": ["a"]},
            "label_names: the data has labels that are not among them: b",
        ),
        (labelled(0.5, 1.5), {}, "label holds 0.5; expected text or whole numbers"),
    ],
)
def test_what_are_no_labels(rows: Rows, keys: dict[str, Any], says: str) -> None:
    data = raw(rows)
    template = template_of(Config(), data, True)
    with pytest.raises(InputError, match=says):
        find_labels(data, template, keys.get("label_names"))
