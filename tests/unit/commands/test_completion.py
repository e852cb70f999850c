"""Shell completion knows every verb, every option of its help, and every configuration key."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from fedlora.commands import VERBS
from fedlora.commands.cli import main
from fedlora.commands.completion import EVERY_VERB, fish
from fedlora.config.config import Config
from fedlora.methods import rule_keys
from support.completion import KNOWN


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_of_the_help_is_known_and_the_other_way_round(verb: str) -> None:
    module = import_module(VERBS[verb])
    taken = {*module.SYNTAX.options, *EVERY_VERB}
    keys = {*Config.model_fields, *rule_keys()}
    usage = module.HELP.partition("\n\n")[0]
    listed = re.findall(r"^  --.*|^ +or --.*", module.HELP, re.M)
    option = r"--([a-z][a-z_]+)"
    named = set(re.findall(option, "\n".join([usage, *listed])))
    others = {"help", "key", "option"}
    if verb == "aggregate":
        assert {*rule_keys()} & taken
        taken -= rule_keys()
    assert named - others <= taken | (keys if module.SYNTAX.keys else set())
    assert taken - {"help"} <= set(re.findall(option, module.HELP))
    assert "[--json]" in usage


def test_every_key_is_an_option_of_verbs_that_take_keys() -> None:
    keys = {*Config.model_fields, *rule_keys()} - {"method_options"}
    for verb in ("run", "partition", "data", "config", "demo", "study"):
        assert keys <= set(KNOWN[verb].options)


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_are_described(verb: str) -> None:
    assert KNOWN[verb].about
    for option in KNOWN[verb].options.values():
        assert option.what


@pytest.mark.parametrize("argv", [[], ["tcsh"], ["bash", "zsh"]])
def test_another_shell_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", *argv]) == 2
    assert "expected one of bash, zsh, fish" in capsys.readouterr().err


def test_fish_has_every_option_of_every_verb() -> None:
    lines = fish(KNOWN).splitlines()
    for name, one in KNOWN.items():
        for key, option in one.options.items():
            own = [
                line
                for line in lines
                if f" -l {key} " in f"{line} "
                and re.search(rf"__fish_seen_subcommand_from [^']*\b{name}\b", line)
            ]
            assert len(own) == 1, (name, key)
            assert (" -r" in own[0].partition(f" -l {key}")[2]) is not option.flag
            for value in option.values:
                assert value in own[0]
