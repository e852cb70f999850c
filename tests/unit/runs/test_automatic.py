"""What a configuration leaves open is decided."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fedlora import threads
from fedlora.config.config import Config
from fedlora.data.datasets import ClientData, FederatedData
from fedlora.data.tokenize import IGNORE
from fedlora.errors import InputError
from fedlora.model.sources import Source
from fedlora.runs.automatic import (
    Threads,
    choose_exact_match,
    choose_threads,
    frozen_dtype,
    with_dtype,
)
from fedlora.runs.planning.fastest_way import Way


def data(*rows: list[int]) -> FederatedData:
    """Rows to evaluate on, given by their labels."""
    tokens = [{"input_ids": [5] * len(labels), "labels": labels} for labels in rows]
    return FederatedData((ClientData(tokens),), tokens, "text", {}, "")


def base(positions: int) -> Any:
    """A model of which only the configuration is there."""
    config = LlamaConfig(max_position_embeddings=positions)
    return SimpleNamespace(model=SimpleNamespace(config=config))


ASKED = [IGNORE, IGNORE, 7, 8]


@pytest.mark.parametrize(
    ("positions", "new", "rows", "chosen"),
    [
        (16, 12, [ASKED], True),
        (16, 13, [ASKED], False),  # an answer might leave the context
        (64, 1, [ASKED], False),  # no answer could be as long as its reference
        (64, 12, [[7, 8, 9]], False),  # nothing is asked
    ],
)
def test_answers_are_compared_where_all_of_them_fit(
    positions: int, new: int, rows: list[list[int]], chosen: bool
) -> None:
    config = Config(generation_max_new_tokens=new)
    assert choose_exact_match(config, base(positions), data(*rows), "CAUSAL_LM") == (
        chosen,
        positions,
    )


def test_answers_that_are_asked_for_or_have_no_meaning() -> None:
    asked = Config(eval_exact_match=True, generation_max_new_tokens=1)
    assert choose_exact_match(asked, base(16), data(ASKED), "CAUSAL_LM")[0]
    with pytest.raises(InputError, match="rows without a prompt"):
        choose_exact_match(asked, base(16), data([7, 8]), "CAUSAL_LM")
    assert not choose_exact_match(asked, base(16), data(ASKED), "SEQ_CLS")[0]


def test_threads_as_configured_or_as_there_are_free_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    class Room:
        """A machine with one free core."""

        busy, cores, load = 3.0, 4, 3.0

        def threads(self, number: int) -> int:
            return 1

    monkeypatch.setattr(threads, "look", Room)
    monkeypatch.setattr(threads, "fewer", lambda number, fit, room: f"{fit} of {number}")
    monkeypatch.setattr(threads, "unchanged", lambda number, fit, room: f"{number}, not {fit}")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert choose_threads(Config(), look=False) == Threads(4)
    assert choose_threads(Config(use_cpu=True), look=True) == Threads(1, choices=("1 of 4",))
    fixed = choose_threads(Config(use_cpu=True, num_threads=3), look=True)
    assert fixed == Threads(3, warnings=("3, not 1",))
    assert choose_threads(Config(use_cpu=True, num_threads=1), look=True) == Threads(1)


def test_threads_that_were_measured() -> None:
    asked = Threads(4, warnings=("busy",))
    assert asked.of_way(None) == asked
    assert asked.of_way(Way("float32", 2, 0, 1)) == Threads(2, warnings=("busy",))
    assert asked.of_way(Way("float32", 1, 4, 1)) == asked  # of the process that evaluates


def test_the_dtype_that_is_written_down() -> None:
    source = Source("tiny", LlamaConfig(hidden_size=32), classifier=False)
    given = Config(dtype="float16")
    assert with_dtype(given, source) == (given, [])
    decided, why = with_dtype(Config(use_cpu=True), source)
    assert decided.dtype == "float32"
    assert why == ["base in float32: layers 32 wide gain nothing from bfloat16"]
    _, why = with_dtype(Config(use_cpu=True, load_in_4bit=True), source)
    assert why[1:] == ["linear layers in 4 bits"]
    assert with_dtype(Config(dtype="float16", load_in_8bit=True), source)[1] == [
        "linear layers in 8 bits"
    ]


def test_the_frozen_weights_name_the_dtype_not_the_head() -> None:
    model = torch.nn.ModuleDict(
        {"head": torch.nn.Linear(1, 1), "trunk": torch.nn.Linear(1, 1).half()}
    )
    full = dict(model["head"].named_parameters("head"))
    assert frozen_dtype(SimpleNamespace(model=model, full_params=full)) == "float16"  # type: ignore[arg-type]
