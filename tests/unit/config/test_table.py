"""A table of a YAML file: read strictly, with a line for every wrong key."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from fedlora.config.table import STRICT, read_table, table
from fedlora.errors import InputError


class Inner(BaseModel):
    model_config = STRICT
    depth: int = 1


class Outer(BaseModel):
    model_config = STRICT
    name: str
    inner: Inner = Inner()
    ports: list[int] | None = None


def test_values_are_read_as_they_were_meant() -> None:
    read = read_table(Outer, "", {"name": "x", "ports": "7", "inner": Inner(depth=2)})
    assert (read.ports, read.inner.depth) == ([7], 2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "part: name: is missing"),
        ({"name": "x", "port": 1}, "part: port: unknown key; did you mean ports"),
        ({"name": "x", "ports": True}, "part: ports: True: expected"),
        ({"name": ["x"]}, "part: name: .*expected one value"),
    ],
)
def test_what_cannot_be_is_told_with_its_place(values: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_table(Outer, "part: ", values)


def test_a_key_without_a_value_is_an_empty_table() -> None:
    assert table("sites", None) == {}
    with pytest.raises(InputError, match="sites: 3: expected a table"):
        table("sites", 3)
