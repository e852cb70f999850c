"""The random rows on which it is tried how a model can be run."""

from __future__ import annotations

from types import SimpleNamespace

from torch import nn

from fedlora.model.trial_rows import LENGTHS, random_rows, vocabulary_size


class Model:
    """A model of which only the embeddings are there."""

    def __init__(self, read: int, written: int | None = None) -> None:
        self.read, self.written = nn.Embedding(read, 2), written

    def get_input_embeddings(self) -> nn.Embedding:
        return self.read

    def get_output_embeddings(self) -> object:
        return None if self.written is None else nn.Linear(2, self.written)


def test_tokens_can_be_read_and_predicted() -> None:
    assert vocabulary_size(Model(50)) == 50
    assert vocabulary_size(Model(50, 40)) == 40
    assert vocabulary_size(Model(50, 64)) == 50  # a head that is padded to a round number
    tied = Model(50)
    tied.get_output_embeddings = lambda: SimpleNamespace(weight=None)  # type: ignore[method-assign]
    assert vocabulary_size(tied) == 50


def test_rows_of_the_lengths_asked_for_without_padding() -> None:
    rows = random_rows(Model(4), 2, False)
    assert tuple(len(row["input_ids"]) for row in rows) == LENGTHS
    assert all(row["labels"] == row["input_ids"] for row in rows)
    tokens = {i for row in rows for i in row["input_ids"]}
    assert tokens == {0, 1, 3}


def test_a_classifiers_rows_have_a_label() -> None:
    rows = random_rows(Model(4), 0, True, lengths=(3, 5))
    assert [len(row["input_ids"]) for row in rows] == [3, 5]
    assert all(row["label"] == 0 and "labels" not in row for row in rows)


def test_a_seed_gives_the_same_rows() -> None:
    model = Model(1000)
    assert random_rows(model, 0, False, seed=1) == random_rows(model, 0, False, seed=1)
    assert random_rows(model, 0, False, seed=1) != random_rows(model, 0, False, seed=2)
