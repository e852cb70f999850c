"""Models measured on a run's rows and on general text."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.commands.eval.models import load_models
from fedlora.commands.eval.rows import general_text_of, measure_general, measure_held_out
from fedlora.data.datasets import ClientData, FederatedData
from fedlora.data.tokenize import Tokens
from fedlora.errors import InputError
from support.measuring import measuring_of
from support.merging import peft_saves

ROWS: list[Tokens] = [{"input_ids": [1, i, i + 1], "labels": [-100, i, i + 1]} for i in (5, 7, 9)]


def test_general_text_compares_with_the_base_whatever_the_order_of_models(
    tiny_llama: Path, tmp_path: Path
) -> None:
    path = peft_saves(tmp_path / "a", tiny_llama, r=2, target_modules=["q_proj"])
    text = tmp_path / "text.txt"
    text.write_text("some general text of no kind at all " * 4)
    measuring = measuring_of(
        path,
        tmp_path / "eval",
        ("adapter", "base"),
        general_file=text,
        general_length=16,
        limit=4,
    )
    assert general_text_of(measuring) == text
    measure_general(measuring, load_models(measuring.subject, ["adapter"]), text)
    scores = measuring.results.of("general")
    assert {name: x["windows"] for name, x in scores.items()} == {"base": 4, "adapter": 4}
    difference = scores["adapter"]["loss"] - scores["base"]["loss"]
    assert scores["adapter"]["forgetting"] == pytest.approx(difference, abs=1e-6)
    assert "forgetting" not in scores["base"]


def test_a_share_of_the_windows(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("0123456789 " * 16)
    measuring = measuring_of(
        tiny_llama, tmp_path / "eval", general_file=text, general_length=16, limit=0.5
    )
    measure_general(measuring, load_models(measuring.subject, []), text)
    assert measuring.results.of("general")["base"]["windows"] == 6  # of eleven, rounded up


def test_no_general_text_where_none_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    assert general_text_of(measuring_of(tiny_llama, tmp_path)) is None


def test_a_clients_rows_are_for_the_shared_models_and_for_its_own(
    tiny_llama: Path, tmp_path: Path
) -> None:
    for name in ("", "client-0", "client-1"):
        peft_saves(tmp_path / "a" / name, tiny_llama, r=2, target_modules=["q_proj"])
    measuring = measuring_of(tmp_path / "a", tmp_path / "eval")
    clients = (ClientData(ROWS), ClientData(ROWS, ROWS[:2]))
    data = FederatedData(clients, ROWS, "text", {}, "")
    models = load_models(measuring.subject, measuring.models_on_rows)
    measure_held_out(measuring, models, data)
    results = measuring.results
    assert list(results.of("held_out")) == ["base", "adapter", "client-0", "client-1"]
    own = results.of("held_out:client-1")
    assert {name: x["rows"] for name, x in own.items()} == {"base": 2, "adapter": 2, "client-1": 2}
    assert results.of("held_out:client-0") == {}
    with pytest.raises(InputError, match="no held-out rows"):
        measure_held_out(measuring, models, FederatedData(clients[:1], (), "text", {}, ""))
