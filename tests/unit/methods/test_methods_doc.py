"""The page of methods has a row for every rule, and the README names each with its file."""

from __future__ import annotations

import pytest

from fedlora import methods
from support.methods_doc import PAGE, from_file
from support.paths import REPOSITORY

README = (REPOSITORY / "README.md").read_text()


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
