"""One HTML file that has all in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fedlora.commands.report.page import data_of, render, rounded
from support.report import collected
from support.report_runs import classifying, lines_of, write_run


def test_floats_are_cut_and_whole_numbers_kept() -> None:
    given = {"a": 1.23456789, 3: [123456789, float("nan"), True, "x"], "b": (1e-12,)}
    assert rounded(given) == {"a": 1.23457, "3": [123456789, None, True, "x"], "b": [1e-12]}


def test_the_page_holds_its_data_and_nothing_can_end_it(tmp_path: Path) -> None:
    lines = classifying(lines_of(clients=2, rounds=2, layers=1))
    lines[0]["model"] = "</script><b>$&"
    report = collected(write_run(tmp_path / "run", lines))
    page = render(report)
    block = re.search(r"<script[^>]*application/json[^>]*>(.*?)</script>", page, re.DOTALL)
    assert block is not None
    data = json.loads(block[1])
    wanted = json.loads(json.dumps({**data_of(report), "made": data["made"]}))
    assert data == wanted
    assert data["runs"][0]["model"] == "</script><b>$&"
    assert not re.search(r"<!--(TITLE|STYLE|DATA|LIBRARY|SCRIPT)-->", page)


def test_it_needs_no_network(tmp_path: Path) -> None:
    page = render(collected(write_run(tmp_path / "run", lines_of(clients=2, layers=1))))
    assert not re.search(r'(?:src|href)="https?:', page)
