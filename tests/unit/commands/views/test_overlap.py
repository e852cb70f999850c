"""The table of an overlap, and what a program reads."""

from __future__ import annotations

import io
import json

from rich.console import Console

from fedlora.adapters.overlap import overlap
from fedlora.commands.views.overlap import mean_shared, overlap_as_json, show_overlap
from support.merging import made

NAMES = ["one", "two", "three"]
FOUND = overlap(
    [made({"q": ((9, 8), 2), "k": ((9, 8), 1)}, 1), made({"q": ((9, 8), 3)}, 2), made({}, 3)]
)


def test_every_adapter_pair_and_layer_has_its_line() -> None:
    console = Console(file=io.StringIO(), width=80)
    show_overlap(FOUND, NAMES, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(f"{i}  norm " in text for i in (1, 2, 3))
    assert f"{FOUND.pairs[0].cosine:.3f}" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.split()}
    assert lines["k"][2:4] == ["-", "-"]
    assert lines["q"][-2:] == ["1", "2"]
    assert lines["q"][-3] == f"{mean_shared(FOUND.layers['q'].pairs[0]):.1%}"


def test_a_program_reads_all_numbers() -> None:
    line = json.loads(json.dumps(overlap_as_json(FOUND, NAMES)))
    assert [adapter["path"] for adapter in line["adapters"]] == NAMES
    assert line["layers"]["q"]["norms"][2] is None
    pair = line["layers"]["q"]["pairs"][0]
    assert (pair["first"], pair["second"]) == (0, 1)
    assert len(pair["angles_out"]) == 2
    assert line["pairs"][1]["cosine"] is None
