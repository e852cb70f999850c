"""How a study goes on, a line per run, and its tables."""

from __future__ import annotations

import io

from rich.console import Console

from fedlora.commands.study.outcomes import Outcome
from fedlora.commands.study.plan import Part, Planned, Study
from fedlora.commands.study.show import Progress, show_tables
from fedlora.commands.study.statistics import Difference
from fedlora.commands.study.tables import Row, Table

PART = Part("table", "two rules", {"method": ("exact", "flora")}, "method", "exact", "exact_match")
RUNS = tuple(
    Planned("table", {"method": f"[{name}]"}, 0, {}, called=name) for name in ("a", "b", "c")
)


def test_a_line_for_each_run_that_ends() -> None:
    console = Console(file=io.StringIO(), width=80)
    with Progress(Study("mine", "small", "", (PART,), (*RUNS, RUNS[0])), console) as progress:
        progress("kept", RUNS[0], {})
        progress("start", RUNS[1], {})
        progress("round", RUNS[1], {"round": 1})
        progress("done", RUNS[1], {})
        progress("start", RUNS[2], {})
        progress("failed", RUNS[2], {"failed": "no [space] left"})
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().strip().splitlines()
    assert lines[0].startswith("2/3  [b] seed 0  ")
    assert lines[1].startswith("3/3  [c] seed 0  ")
    assert lines[1].endswith("FAILED: no [space] left")


def test_a_table_cell_by_cell() -> None:
    def row(label: str, values: list[float], difference: Difference | None) -> Row:
        outcomes = {i: Outcome(x, x, None, 0, 0, 1.0) for i, x in enumerate(values)}
        return Row((), label, outcomes, difference)

    difference = Difference(-0.25, -0.3, -0.2, 2)
    rows = (row("exact", [0.5, 0.6], None), row("flora", [0.3], difference))
    console = Console(file=io.StringIO(), width=100)
    show_tables([Table(PART, rows, {"flora seed 1": "not complete"})], console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["exact"] == ["exact", "55.0", "7.1", "2"]
    assert lines["flora"] == ["flora", "30.0", "-", "1", "-25.0", "-30.0", "to", "-20.0", "loses"]
    assert "1 runs are missing" in text
