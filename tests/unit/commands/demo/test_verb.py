"""`fedlora demo`: its keys go to the demonstration."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.commands.demo import showcase
from fedlora.commands.demo.verb import SYNTAX, verb
from fedlora.errors import InputError


def test_keys_and_json_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(showcase, "demo", lambda keys, emit: given.append((keys, emit)))
    emit = given.append
    assert verb(["--seeds", "3", "4", "--num_rounds", "2"], emit) == 0
    assert given == [({"seeds": ["3", "4"], "num_rounds": "2"}, emit)]


def test_a_value_without_a_key_is_refused() -> None:
    with pytest.raises(InputError, match="expected --key value"):
        verb(["my.yaml"])


def test_it_takes_the_keys_of_a_configuration() -> None:
    assert SYNTAX.keys
    assert SYNTAX.options.keys() == {"seeds", "processes"}
