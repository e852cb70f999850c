"""A key's value as it was meant, before its type is checked."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from fedlora import Config
from fedlora.config.as_meant import as_meant, refuse_truth
from fedlora.errors import InputError

ONE_OR_LIST = int | list[int] | None
LIST = list[str] | None


@pytest.mark.parametrize(
    ("value", "annotation", "meant"),
    [
        ("none", str | None, None),
        ("NULL", int | None, None),
        ("none", str, "none"),  # where nothing is no value, it is text
        ("score", LIST, ["score"]),
        (["score"], LIST, ["score"]),
        (None, LIST, None),
        (4, ONE_OR_LIST, 4),  # one rank for all is not a list of one rank
        ("none", LIST, None),
        (None, Literal["none", "int8"], "none"),  # a command line's word for nothing
        (None, str | None, None),
    ],
)
def test_what_is_unmistakable_is_taken(value: Any, annotation: Any, meant: Any) -> None:
    assert as_meant("key", value, annotation) == meant


@pytest.mark.parametrize(
    ("text", "meant"),
    [("1", "1"), (" +3 ", " +3 "), ("1.0", 1.0), ("0.25", 0.25), ("half", "half"), (2, 2)],
)
def test_a_share_is_written_with_a_point(text: Any, meant: Any) -> None:
    value = as_meant("clients_per_round", text, int | float | None)
    assert (value, type(value)) == (meant, type(meant))


def test_truth_is_no_number() -> None:
    with pytest.raises(ValueError, match=r"^lora_r: True: expected .*\(a key without a value"):
        refuse_truth("lora_r", True, int)
    with pytest.raises(ValueError, match=r"^ranks: \[1, False\]: expected [^(]*$"):
        refuse_truth("ranks", [1, False], list[int])
    refuse_truth("use_rslora", True, bool)
    refuse_truth("use_cpu", True, bool | None)


def test_a_list_where_one_text_is_wanted_was_a_pattern() -> None:
    with pytest.raises(ValueError, match="expected one value; a file pattern has to be quoted"):
        as_meant("train_file", ["a.json", "b.json"], str | None)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"first": {}}, "'first' is no client: expected a number from 0"),
        ({-1: {}}, "-1 is no client"),
        ({0: 4}, "client 0: 4: expected its keys and values"),
    ],
)
def test_a_table_of_clients(table: Any, says: str) -> None:
    annotation = dict[int, dict[str, Any]] | str | None
    with pytest.raises(ValueError, match=f"^client_overrides: {says}"):
        as_meant("client_overrides", table, annotation)
    assert as_meant("client_overrides", {"3": {"lora_r": 2}}, annotation) == {"3": {"lora_r": 2}}


def test_sites_of_a_command_line() -> None:
    assert Config(engine="sites", sites=["a=/x/a.sock", "b=host:1"]).sites == {  # type: ignore[arg-type]
        "a": "/x/a.sock",
        "b": "host:1",
    }
    assert Config(engine="sites", sites="a=x=y").sites == {"a": "x=y"}  # type: ignore[arg-type]
    for given, says in ((["a"], "expected name=address"), (["a=x", "a=y"], "given twice")):
        with pytest.raises(InputError, match=says):
            Config(engine="sites", sites=given)  # type: ignore[arg-type]
