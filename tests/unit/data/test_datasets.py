"""Tokenised data of every client and of the evaluation, from rows given as they are."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from fedlora.config.config import Config
from fedlora.data.datasets import load_data
from fedlora.data.raw_data import RawData
from fedlora.data.rows import Rows
from fedlora.errors import InputError
from support.tokens import byte_level


@cache
def tokenizer() -> Any:
    """A token per byte."""
    return byte_level(trained=False)


def texts(*values: str) -> Rows:
    """Rows of plain text."""
    return [{"text": value} for value in values]


def raw(*clients: Rows, evaluation: Rows | None = None) -> RawData:
    """Rows of clients with a file each."""
    names = [f"part_{i}.json" for i in range(len(clients))]
    return RawData(list(clients), names, evaluation or [], "part_*.json")


def spoken(rows: Any) -> list[str]:
    """The texts of tokenised rows."""
    return [tokenizer().decode(row["input_ids"]).removesuffix("<|endoftext|>") for row in rows]


def test_every_client_gets_its_own_rows_in_order() -> None:
    data = load_data(Config(), tokenizer(), raw(texts("a", "b"), texts("c"), evaluation=texts("d")))
    assert [spoken(client.train) for client in data.clients] == [["a", "b"], ["c"]]
    assert spoken(data.eval) == ["d"]
    assert data.template == "text"
    assert data.dropped == {}


def test_rows_that_cannot_be_used_are_counted_by_their_reason() -> None:
    rows = [
        {"prompt": "q" * 40, "completion": "a"},
        {"prompt": "q", "completion": "a"},
    ]
    data = load_data(Config(max_length=16), tokenizer(), raw(rows))
    assert [len(client.train) for client in data.clients] == [1]
    assert data.dropped == {"cut to max_length 16, it has no token left to learn from": 1}


def test_rows_held_out_are_not_trained_on() -> None:
    rows = texts(*"abcdefgh")
    data = load_data(Config(client_eval_fraction=0.25), tokenizer(), raw(rows, rows))
    for client in data.clients:
        train, held_out = spoken(client.train), spoken(client.eval)
        assert len(held_out) == 2
        assert sorted([*train, *held_out]) == list("abcdefgh")
    assert spoken(data.clients[0].eval) != spoken(data.clients[1].eval)  # drawn for each client


def test_the_fingerprint_is_that_of_the_tokens_and_whose_they_are() -> None:
    def of(*clients: Rows) -> str:
        return load_data(Config(), tokenizer(), raw(*clients)).fingerprint

    assert of(texts("a", "b"), texts("c")) == of(texts("a", "b"), texts("c"))
    others = [of(texts("a"), texts("b", "c")), of(texts("b", "a"), texts("c"))]
    assert len({of(texts("a", "b"), texts("c")), *others}) == 3


def test_labels_in_the_order_of_their_ids() -> None:
    rows = [{"text": "x", "label": label} for label in ("10", "9", "9")]
    data = load_data(Config(label_column_name="label"), tokenizer(), raw(rows))
    assert data.label_names == ("9", "10")
    assert [row["label"] for row in data.clients[0].train] == [1, 0, 0]


def test_no_row_left_is_refused() -> None:
    with pytest.raises(InputError, match="no client has a row to train on; lower client_eval"):
        load_data(Config(client_eval_fraction=0.6), tokenizer(), raw(texts("a")))
    with pytest.raises(InputError, match=r"part_0\.json, row 2: "):
        load_data(Config(), tokenizer(), raw([{"messages": [{"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"}]}, {"messages": [{"a": 1}]}]))  # fmt: skip
