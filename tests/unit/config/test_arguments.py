"""The command line: options of a verb are taken out of it, the rest are configuration keys."""

from __future__ import annotations

from typing import Any

import pytest

from fedlora.config.arguments import (
    Option,
    Syntax,
    parse_overrides,
    take,
    take_flag,
    take_value,
)
from fedlora.errors import InputError


def test_a_flag_is_taken_out_in_either_spelling() -> None:
    arguments = ["--dry-run", "--seed", "3"]
    assert take_flag(arguments, "--dry_run")
    assert arguments == ["--seed", "3"]
    assert not take_flag(arguments, "--dry_run")


@pytest.mark.parametrize("given", [["--out-dir", "here"], ["--out_dir=here"]])
def test_a_value_is_taken_out_in_either_form(given: list[str]) -> None:
    arguments = ["a.yaml", *given, "--seed", "3"]
    assert take_value(arguments, "--out_dir", "a directory") == "here"
    assert arguments == ["a.yaml", "--seed", "3"]


@pytest.mark.parametrize("given", [["--out"], ["--out="], ["--out", "--seed"]])
def test_a_missing_value_is_asked_for(given: list[str]) -> None:
    with pytest.raises(InputError, match=r"^--out: give a directory$"):
        take_value(given, "--out", "a directory")


def test_what_is_not_there_is_none() -> None:
    arguments = ["--seed", "3"]
    assert take_value(arguments, "--out", "a directory") is None
    assert arguments == ["--seed", "3"]


def test_a_verb_takes_its_own_options_and_leaves_lists_and_keys() -> None:
    syntax = Syntax(
        {"plot": Option(flag=True), "out": Option("a file"), "models": Option(many=True)}
    )
    arguments = ["run", "--out", "x", "--models", "a", "b", "--seed", "3"]
    assert take(arguments, syntax) == {"plot": False, "out": "x"}
    assert arguments == ["run", "--models", "a", "b", "--seed", "3"]


@pytest.mark.parametrize(
    ("tokens", "keys"),
    [
        ([], {}),
        (["--seed", "3"], {"seed": "3"}),
        (["--seed=3"], {"seed": "3"}),
        (["--num-rounds", "3"], {"num_rounds": "3"}),
        (["--use_cpu", "--seed", "3"], {"use_cpu": True, "seed": "3"}),
        (["--client_ranks", "8", "4"], {"client_ranks": ["8", "4"]}),
        (["--eval_file", "None", "--x", "null"], {"eval_file": None, "x": None}),
        (["--x="], {"x": ""}),
        (["--lr", "-1"], {"lr": "-1"}),
    ],
)
def test_keys_and_values(tokens: list[str], keys: dict[str, Any]) -> None:
    assert parse_overrides(tokens) == keys


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["3"], "'3': expected --key value; the configuration file comes first"),
        (["--=3"], "'--=3': expected --key value"),
        (["--seed", "3", "--seed=4"], "--seed is given twice"),
        (["--num-rounds", "3", "--num_rounds", "4"], "--num_rounds is given twice"),
    ],
)
def test_what_is_no_key_and_value_is_refused(tokens: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        parse_overrides(tokens)
    assert str(error.value) == message
