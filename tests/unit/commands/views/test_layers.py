"""What became of every layer when adapters were combined."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from fedlora.adapters.aggregate import aggregate
from fedlora.commands.views.layers import show_layers
from support.merging import made


def shown(**more: object) -> str:
    """Two adapters, one of which lacks a module."""
    one, other = made({"a.q": ((6, 5), 2), "a.v": ((6, 5), 2)}), made({"a.q": ((6, 5), 3)}, 1)
    if more:
        one.dense["score.weight"] = torch.ones(2, 3)
    console = Console(file=io.StringIO(), width=80)
    show_layers(aggregate([one, other], [3, 1]), ["[x]/one", "two"], console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_line_for_each_adapter_and_each_layer() -> None:
    lines = [line.split() for line in shown().splitlines()]
    assert ["1", "weight", "0.7500", "[x]/one"] in lines
    assert ["2", "weight", "0.2500", "two"] in lines
    rows = {line[0]: line for line in lines if line and line[0].startswith("a.")}
    assert rows["a.q"][1:4] == ["2", "3", "5"]
    assert rows["a.v"][1:4] == ["2", "-", "2"]
    assert all(float(row[4]) < 1e-6 for row in rows.values())


def test_what_is_saved_whole_is_named() -> None:
    text = shown(head=True)
    assert "saved whole and averaged: score.weight (whether their rows stand for" in text
