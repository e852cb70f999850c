"""Scores of a classifier are those of scikit-learn, and its labels are read from the rows.

Their training and their heads are in tests/runs/test_classifier_training.py and _heads.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedlora
from fedlora.client.evaluate import scores
from support.architectures import labelled_rows
from support.classifier import (
    bert,  # noqa: F401
    session_of,
    sites,
)


@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(
            st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), min_size=1, max_size=40
        ).map(lambda pairs: (n, pairs))
    )
)
@settings(deadline=None, max_examples=25)
def test_scores_are_those_of_scikit_learn(case: tuple[int, list[tuple[int, int]]]) -> None:
    from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

    number, pairs = case
    truth, guess = [t for t, _ in pairs], [g for _, g in pairs]
    names = [f"label {i}" for i in range(number)]
    found = scores(torch.tensor(truth), torch.tensor(guess), names)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    assert found["macro_f1"] == pytest.approx(
        f1_score(truth, guess, average="macro", zero_division=0)
    )
    table = precision_recall_fscore_support(
        truth, guess, labels=list(range(number)), zero_division=0
    )
    assert list(found["per_class"]) == names
    for i, name in enumerate(names):
        assert [found["per_class"][name][key] for key in ("precision", "recall", "f1")] == (
            pytest.approx([column[i] for column in table[:3]])
        )
        assert found["per_class"][name]["support"] == table[3][i]


def test_labels_absent_in_truth_or_guesses() -> None:
    """Of five labels one is never guessed, one never true, one neither."""
    from sklearn.metrics import f1_score

    truth, guess = [0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 3, 0, 0, 1]
    found = scores(torch.tensor(truth), torch.tensor(guess), list("abcde"))
    assert found["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 3}
    assert found["per_class"]["d"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert found["per_class"]["e"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    expected = f1_score(truth, guess, average="macro", zero_division=0)  # over a, b, c, d
    assert found["macro_f1"] == pytest.approx(expected)
    assert found["macro_f1"] != pytest.approx(
        f1_score(truth, guess, average="macro", labels=range(5), zero_division=0)
    )


def test_labels_are_sorted_naturally(bert: Path, tmp_path: Path) -> None:
    labels = ["item 10", "item 9", "b", "10", "9", "item 1"]
    part = labelled_rows(12, 0, labels)
    files = sites(tmp_path / "files", part, part, held_out=part[:3])
    session = session_of(bert, files, tmp_path)
    assert session.data.label_names == ("9", "10", "b", "item 1", "item 9", "item 10")
    ids = [session.data.label_names.index(row["label"]) for row in part]
    assert [row["label"] for row in session.data.clients[0].train] == ids


def test_fractions_are_no_labels(bert: Path, tmp_path: Path) -> None:
    part = labelled_rows(12, 0, [0.5, 1.0])
    files = sites(tmp_path / "files", part, part, held_out=part)
    with pytest.raises(fedlora.InputError, match=r"label_column_name: .*0\.5.*whole numbers"):
        session_of(bert, files, tmp_path)


def test_one_label_is_no_classification(bert: Path, tmp_path: Path) -> None:
    part = labelled_rows(6, 0, ["fig"])
    files = sites(tmp_path / "files", part, part, held_out=labelled_rows(3))
    with pytest.raises(fedlora.InputError, match=r"label has one value \(fig\) in all 12"):
        session_of(bert, files, tmp_path)


def test_a_row_without_a_label_is_named(bert: Path, tmp_path: Path) -> None:
    part = labelled_rows(6)
    hole = [*part[:2], {"text": "a", "label": None}]
    files = sites(tmp_path / "files", part, hole, held_out=part)
    with pytest.raises(fedlora.InputError, match=r"label_1\.jsonl, row 3 has no label"):
        session_of(bert, files, tmp_path)
