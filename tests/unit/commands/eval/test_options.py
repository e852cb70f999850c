"""What `fedlora eval` and `fedlora generate` read of a command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlora.commands.eval.options import LOADING, Given, Loading, first
from fedlora.config.arguments import Option
from fedlora.errors import InputError

KNOWN = {**LOADING, "limit": Option("how many"), "models": Option(many=True)}


def given(*arguments: str) -> Given:
    return Given("eval", ["embedded", *arguments], KNOWN)


def test_a_model_comes_first() -> None:
    for arguments in ([], ["--limit", "3"]):
        with pytest.raises(InputError, match="eval"):
            Given("eval", arguments, KNOWN)


def test_an_unknown_key_is_refused_with_what_was_meant() -> None:
    with pytest.raises(InputError, match="did you mean limit"):
        given("--limt", "3")


@pytest.mark.parametrize(("text", "limit"), [("3", 3), ("0.25", 0.25), (None, None)])
def test_a_limit_is_a_number_or_a_share(text: str | None, limit: float | None) -> None:
    assert given(*(["--limit", text] if text else [])).limit() == limit


@pytest.mark.parametrize("text", ["0", "1.0", "1.5", "-2", "few", "nan"])
def test_an_impossible_limit_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected a number of items, or a share below 1"):
        given("--limit", text).limit()


@pytest.mark.parametrize(
    ("arguments", "truth"),
    [
        ([], None),
        (["--use_cpu"], True),
        (["--use_cpu", "yes"], True),
        (["--use_cpu", "0"], False),
        (["--use_cpu", "FALSE"], False),
    ],
)
def test_true_false_or_not_given(arguments: list[str], truth: bool | None) -> None:
    assert given(*arguments).truth("use_cpu") is truth


def test_what_is_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(InputError, match=r"^--use_cpu: 'perhaps': expected true or false$"):
        given("--use_cpu", "perhaps").truth("use_cpu")


def test_a_whole_number_of_at_least_so_much() -> None:
    assert given("--round", "0").whole("round", 0) == 0
    for text in ("0", "-1", "2.5"):
        with pytest.raises(InputError, match="expected a whole number of at least 1"):
            given("--round", text).whole("round")


def test_a_file_has_to_be_there(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    asked = given("--chat_template_path", str(path))
    with pytest.raises(InputError, match="no such file"):
        asked.file("chat_template_path")
    path.touch()
    assert asked.file("chat_template_path") == path


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["--device", "cpu"], {"use_cpu": True}),
        (["--device", "cuda"], {"use_cpu": False}),
        (["--use_cpu", "--num_threads", "2"], {"use_cpu": True, "num_threads": 2}),
        (["--dtype", "bfloat16", "--round", "0"], {"dtype": "bfloat16", "round": 0}),
    ],
)
def test_how_a_model_is_loaded(arguments: list[str], expected: dict[str, Any]) -> None:
    made = given(*arguments).loading(["base"])
    assert made == Loading("embedded", models=("base",), **expected)


@pytest.mark.parametrize("arguments", [["--dtype", "int8"], ["--device", "tpu"]])
def test_an_impossible_way_to_load_is_refused(arguments: list[str]) -> None:
    with pytest.raises(InputError, match=arguments[1]):
        given(*arguments).loading([])


@pytest.mark.parametrize(
    ("limit", "number"), [(None, 10), (3, 3), (99, 10), (0.25, 3), (0.5, 5), (0.01, 1)]
)
def test_a_share_of_the_items_is_rounded_up(limit: float | None, number: int) -> None:
    assert list(first(range(10), limit)) == list(range(number))
