"""docs/methods.md says what the rules declare, and its example of a new rule works as written."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fedlora
from conftest import REPOSITORY
from fedlora import methods

PAGE = (REPOSITORY / "docs" / "methods.md").read_text()
README = (REPOSITORY / "README.md").read_text()


def from_file(name: str, path: Path) -> Any:
    """A module from a file outside the package."""
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


SCRIPT = from_file("methods_table", REPOSITORY / "scripts" / "methods_table.py")


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_every_rule_has_its_row(name: str) -> None:
    assert SCRIPT.row(name, methods.METHODS[name]) in PAGE


def test_the_page_is_what_the_script_writes() -> None:
    inside = PAGE.partition(SCRIPT.BEGIN)[2].partition(SCRIPT.END)[0]
    assert inside == f"{SCRIPT.table()}\n{SCRIPT.sources()}"


def test_the_readme_names_every_rule_and_its_file() -> None:
    for name in methods.METHODS:
        assert f"`{name}`" in README
        assert (REPOSITORY / "src" / "fedlora" / "methods" / f"{name}.py").is_file()


def test_the_new_rule_of_the_page_runs(
    small_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file and the line of the page, and nothing else."""
    code = re.search(r"```python\n(.*?)```", PAGE, re.S)
    assert code is not None
    lines = [line.removeprefix("   ") for line in code.group(1).splitlines()]
    (tmp_path / "cautious.py").write_text("\n".join(lines))
    cautious = from_file("cautious", tmp_path / "cautious.py")
    monkeypatch.setitem(methods.METHODS, "cautious", cautious.RULE)
    small_run |= {"client_ranks": [4] * 4, "num_rounds": 1, "save_total_limit": None}
    runs = {}
    for share in (0.0, 1.0):
        out = str(tmp_path / f"share-{share}")
        config = fedlora.Config(
            **{**small_run, "method": "cautious", "share": share, "output_dir": out}
        )
        runs[share] = fedlora.run(config)
    plain = fedlora.run(fedlora.Config(**{**small_run, "method": "fedit"}))
    assert runs[1.0].evaluations == plain.evaluations
    assert runs[0.0].evaluations[1] == runs[0.0].evaluations[0]
    assert runs[0.0].evaluations[1] != runs[1.0].evaluations[1]
