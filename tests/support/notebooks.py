"""Runs the cells of a notebook in this process, as Jupyter does in one of its own."""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.commands.cli import main


def cells_of(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook, in their order."""
    cells: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return cells


def run_notebook(path: Path) -> dict[str, Any]:
    """Run all code cells one after the other; gives the names they leave behind.

    A line that begins with `!fedlora` runs the command; an exit code other than 0 is a failure, as
    is an exception of a cell.
    """
    names: dict[str, Any] = {"__name__": "__main__", "__command__": _command}
    for number, cell in enumerate(cells_of(path)):
        if cell["cell_type"] == "code":
            _run_cell("".join(cell["source"]), f"{path.name}, cell {number}", names)
    return names


def _run_cell(source: str, title: str, names: dict[str, Any]) -> None:
    lines = [_as_python(line) for line in source.splitlines()]
    exec(compile(ast.parse("\n".join(lines), title), title, "exec"), names)


def _as_python(line: str) -> str:
    """A line of a cell; that of a command as a call."""
    if not line.startswith("!"):
        return line
    words = shlex.split(line[1:])
    assert words[0] == "fedlora", f"{line}: notebooks run fedlora alone"
    return f"__command__({words[1:]!r})"


def _command(arguments: Sequence[str]) -> None:
    code = main(arguments)
    assert code == 0, f"fedlora {shlex.join(arguments)}: exit code {code}"
