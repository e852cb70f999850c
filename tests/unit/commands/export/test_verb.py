"""`fedlora export`: its help, and a mistake before anything is loaded."""

from __future__ import annotations

import pytest

from fedlora.commands.export.verb import HELP, SYNTAX, verb
from fedlora.errors import InputError


def test_the_help_names_every_option() -> None:
    missing = [key for key in SYNTAX.options if f"--{key}" not in HELP]
    assert not missing
    assert all(len(line) <= 100 for line in HELP.splitlines())


def test_a_mistake_is_found_before_anything_is_loaded() -> None:
    with pytest.raises(InputError, match="exclude each other"):
        verb(["nowhere", "--rank", "4", "--energy", "0.5"])
    with pytest.raises(InputError, match="nowhere: "):
        verb(["./nowhere"])
