"""The tokenised data: lengths, and samples with what is learnt of them."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from fedlora.commands.views.samples import (
    first_samples,
    quantiles,
    show_samples,
    token_lengths,
    token_pieces,
)
from fedlora.config.config import Config
from fedlora.data.datasets import ClientData, FederatedData
from fedlora.data.tokenize import IGNORE
from support.tokens import byte_level


def row(length: int, learnt: int) -> dict[str, Any]:
    """So many tokens, the last of them learnt."""
    return {"input_ids": [70] * length, "labels": [IGNORE] * (length - learnt) + [70] * learnt}


DATA = FederatedData(
    (ClientData([row(4, 2), row(6, 2)], [row(8, 1)]), ClientData([row(5, 5)])),
    [],
    "text",
    {"empty": 2},
    "",
)


def test_lengths_and_tokens_that_are_learnt() -> None:
    lengths, learnt = token_lengths(DATA)
    assert lengths == [4, 5, 6, 8]
    assert learnt == 2 + 2 + 1 + 4  # a first token is predicted from nothing
    assert quantiles(lengths) == [4, 6, 8, 8]
    assert quantiles(list(range(100))) == [0, 50, 95, 99]
    assert quantiles([3]) == [3, 3, 3, 3]


def test_samples_are_taken_in_turn() -> None:
    assert [(k, len(r["input_ids"])) for k, r in first_samples(DATA, 2)] == [(0, 4), (1, 5)]
    assert [k for k, _ in first_samples(DATA, 9)] == [0, 0, 1]


def test_pieces_are_the_text_and_what_is_learnt_of_it() -> None:
    tokenizer = byte_level(trained=False)
    ids = tokenizer("añb")["input_ids"]
    pieces = list(token_pieces(ids, [False, True, True, False], tokenizer))
    assert "".join(text for text, _ in pieces) == "añb"
    assert [learnt for _, learnt in pieces] == [False, True, False]


def test_what_a_person_sees() -> None:
    console = Console(file=io.StringIO(), width=200)
    show_samples(DATA, byte_level(trained=False), Config(max_length=8), 1, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "template text: 4 rows of 2 clients, 0 to evaluate on" in text
    assert "1 reach max_length 8" in text
    assert "a loss is taken on 39.1% of 23 tokens" in text
    assert "2 rows are dropped: empty" in text
