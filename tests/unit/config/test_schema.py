"""`fedlora config --schema`: what an editor accepts is what a run accepts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedlora.commands.cli import main
from fedlora.config.config import CLIENT_KEYS, Config
from fedlora.config.schema import config_schema
from fedlora.embedded import CONFIG
from fedlora.errors import InputError
from fedlora.methods import METHODS
from support.paths import REPOSITORY

SCHEMA = config_schema()


FILES = [
    *(p for p in sorted((REPOSITORY / "examples").rglob("*.yaml")) if p.parent.name != "tasks"),
    CONFIG,
]


_TYPES: dict[str, Any] = {
    "string": lambda x: isinstance(x, str),
    "boolean": lambda x: isinstance(x, bool),
    "null": lambda x: x is None,
    "array": lambda x: isinstance(x, list),
    "object": lambda x: isinstance(x, dict),
    "number": lambda x: isinstance(x, int | float) and not isinstance(x, bool),
    "integer": lambda x: not isinstance(x, bool) and isinstance(x, int | float) and x == int(x),
}


_SAYS_NOTHING = {"title", "description", "default", "examples", "$schema", "then"}


def number(x: Any) -> bool:
    return bool(_TYPES["number"](x))


def same(x: Any, y: Any) -> bool:
    return bool(x == y) and isinstance(x, bool) == isinstance(y, bool)


def valid(x: Any, schema: Mapping[str, Any]) -> bool:
    return all(holds(x, keyword, wanted, schema) for keyword, wanted in schema.items())


def holds(x: Any, keyword: str, wanted: Any, schema: Mapping[str, Any]) -> bool:
    table = x if isinstance(x, dict) else {}
    match keyword:
        case "type":
            return bool(_TYPES[wanted](x))
        case "enum":
            return any(same(x, y) for y in wanted)
        case "const":
            return same(x, wanted)
        case "anyOf":
            return any(valid(x, one) for one in wanted)
        case "allOf":
            return all(valid(x, one) for one in wanted)
        case "not":
            return not valid(x, wanted)
        case "if":
            return not valid(x, wanted) or valid(x, schema["then"])
        case "required":
            return not isinstance(x, dict) or set(wanted) <= set(x)
        case "properties":
            return all(valid(x, wanted[k]) for k, x in table.items() if k in wanted)
        case "patternProperties":
            return all(
                valid(v, s) for k, v in table.items() for p, s in wanted.items() if re.search(p, k)
            )
        case "additionalProperties":
            assert wanted is False
            patterns = schema.get("patternProperties", {})
            known = schema.get("properties", {})
            return all(k in known or any(re.search(p, k) for p in patterns) for k in table)
        case "pattern":
            return not isinstance(x, str) or bool(re.search(wanted, x))
        case "minimum":
            return not number(x) or x >= wanted
        case "maximum":
            return not number(x) or x <= wanted
        case "exclusiveMinimum":
            return not number(x) or x > wanted
        case "exclusiveMaximum":
            return not number(x) or x < wanted
        case "items":
            return not isinstance(x, list) or all(valid(one, wanted) for one in x)
        case "minItems":
            return not isinstance(x, list) or len(x) >= wanted
        case "$ref":
            found: Any = SCHEMA
            for part in wanted.removeprefix("#/").split("/"):
                found = found[part]
            return valid(x, found)
    assert keyword in _SAYS_NOTHING, f"the schema uses {keyword}, which this test cannot check"
    return True


@cache
def validator() -> Any:
    """The reference validator, or None where it is not installed."""
    if not find_spec("jsonschema"):
        return None
    from jsonschema import Draft202012Validator

    return Draft202012Validator(SCHEMA)


def accepted(values: dict[str, Any]) -> bool:
    """By the schema: by our validator, and by jsonschema where it is installed."""
    as_json = json.loads(json.dumps(values))  # keys of YAML are text here, as in an editor
    ours = valid(as_json, SCHEMA)
    if validator():
        assert validator().is_valid(as_json) is ours, values
    return ours


def why_refused(values: dict[str, Any]) -> str:
    """By the configuration; "" where it is accepted."""
    try:
        Config(**values)
    except InputError as error:
        return str(error)
    return ""


def test_it_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    assert main(["config", "--schema", "--json"]) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert json.loads(line) == SCHEMA
    assert main(["config", "--schema", "--seed", "1"]) == 2


def test_it_is_itself_a_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_key_with_its_line_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    keys = SCHEMA["properties"]
    seen = set()
    for method, rule in METHODS.items():
        assert main(["config", "--method", method]) == 0
        for line in capsys.readouterr().out.splitlines():
            setting, _, description = line.partition(" # ")
            key, _, value = setting.partition(": ")
            assert keys[key]["title"] == key
            assert keys[key]["description"].startswith(description.strip())
            if key != "method":
                assert keys[key]["default"] == yaml.safe_load(value), key
            seen.add(key)
        assert rule.name == method
    assert seen | {"method_options"} == set(keys)


def test_defaults_are_accepted() -> None:
    for method in METHODS:
        assert accepted(Config(method=method).flat())


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_examples_are_accepted(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    assert accepted(values)
    assert accepted(Config(**values).flat())


WRONG: list[dict[str, Any]] = [
    {"lora_rnk": 4},
    {"lora_r": 0},
    {"lora_r": 1.5},
    {"lora_r": "many"},
    {"num_rounds": None},
    {"learning_rate": 0},
    {"learning_rate": True},
    {"lora_dropout": 1},
    {"adam_beta1": -0.1},
    {"dtype": "float8"},
    {"method": "flor"},
    {"partition": "even"},
    {"client_ranks": [4, 0]},
    {"client_ranks": []},
    {"client_ranks": "many"},
    {"rank_choices": [0]},
    {"clients_per_round": 1.5},
    {"clients_per_round": 0},
    {"cohort_size": 0},
    {"cohort_size": "big"},
    {"max_steps": 0},
    {"max_steps": -2},
    {"lora_alpha": 0},
    {"lora_alpha": "2s"},
    {"use_cpu": "perhaps"},
    {"start_fraction": 1.5},
    {"max_rank": 0},
    {"method": "flora", "start_fraction": 0.5},
    {"scaling_factor": 1.0},
    {"method": "flora", "scaling_factor": 0},
    {"method": "florist", "energy_threshold": 0},
    {"method": "hetlora", "rank_decay": 1.1},
    {"client_overrides": {"0": {"num_rounds": 3}}},
    {"client_overrides": {"0": {"lora_r": 0}}},
    {"client_overrides": {"first": {"lora_r": 4}}},
    {"train_file": ["a.jsonl", "b.jsonl"]},
]


@pytest.mark.parametrize("values", WRONG, ids=str)
def test_wrong_values_are_refused(values: dict[str, Any]) -> None:
    assert not accepted(values)


def test_what_a_client_may_have_of_its_own() -> None:
    assert accepted({"client_overrides": {3: {"lora_r": 4, "lora_target_modules": ["q_proj"]}}})
    assert accepted({"client_overrides": "sites/*.yaml"})
    for key in CLIENT_KEYS:
        value = SCHEMA["properties"][key]["default"]
        assert accepted({"client_overrides": {0: {key: value}}}), key


BATTERY: list[Any] = [
    None, "none", True, False, -2, -1, 0, 1, 2, 1000, -0.5, 0.25, 0.999, 1.0, 1.5, 1e9,
    "auto", "text", "", "2r", "r", "all", [], [0], [1], [2, 3], [0.5, 0.5], ["a"], ["a", "b"],
    [True], [None], {}, {"a": 1}, {"a": "b"}, ["a=b", "c=d"], ["a=b", "c=b"],
]  # fmt: skip


def words(key: str) -> list[Any]:
    """The words the schema itself names for a key."""
    found = SCHEMA["properties"][key]
    kinds = [found, *found.get("anyOf", [])]
    return [x for kind in kinds for x in kind.get("enum", [])]


BESIDE = {  # what a key needs beside it
    "prompt_template": {"completion_template": "{a}"},
    "partition_shares": {"partition": "quantity"},
    "partition": {"partition_column": "a"},
    "template": {"completion_template": "{a}"},
    "rank_shares": {"rank_choices": [4, 8]},
    "num_workers": {"engine": "workers"},
    "round_timeout": {"engine": "workers"},
    "sites": {"engine": "sites"},
    "kit": {"engine": "nvflare"},
}


BETWEEN_KEYS = (  # what the schema leaves to the configuration
    "for 2 rank_choices",
    "belong to template",
    "give one column, or two",
    "must be positive",
    "exclude each other",
    "is given twice",
    "has no such option",  # in method_options
    "engine: sites needs them",
    "engine: nvflare needs it",
    "have the same address",
    "say how much each client has",
    "is no share",  # 2.0 is a whole number to JSON Schema, and a share to YAML
)


@pytest.mark.parametrize("key", SCHEMA["properties"])
def test_both_judge_alike(key: str) -> None:
    """Whatever the schema accepts of a key the configuration accepts; what only the configuration
    accepts is a spelling that it reads and that an editor need not offer."""
    rules = [name for name, rule in METHODS.items() if hasattr(rule.options, key)]
    beside = BESIDE.get(key, {"method": rules[0]} if rules and key != "method" else {})
    agreed = 0
    for value in [*BATTERY, *words(key)]:
        values = {**beside, key: value}
        why = why_refused(values)
        if accepted(values):
            if key == "template" and value != "custom":
                continue  # completion_template belongs to custom alone
            assert not why or any(text in why for text in BETWEEN_KEYS), (values, why)
            agreed += not why
        elif not why:
            assert is_a_spelling(key, value), values
    assert agreed


def is_a_spelling(key: str, value: Any) -> bool:
    """Read from the command line, where all is text, and from Python: text for a number or a truth,
    1 and 0 for a truth, an empty table or list, nothing for the word "none"."""
    if key == "report_to":  # names are looked at when a run begins
        return True
    text = isinstance(value, str) or value in ([], {}) or (isinstance(value, list) and not value)
    truth = SCHEMA["properties"][key].get("type") == "boolean" or "boolean" in str(
        SCHEMA["properties"][key]
    )
    none = value is None and "none" in words(key)
    return text or none or (truth and value in (0, 1)) or (key == "method_options" and not value)


def test_no_number_that_json_lacks() -> None:
    def walk(x: Any) -> None:
        if isinstance(x, dict):
            for one in x.values():
                walk(one)
        elif isinstance(x, list):
            for one in x:
                walk(one)
        else:
            assert not isinstance(x, float) or math.isfinite(x)

    walk(SCHEMA)
    json.dumps(SCHEMA, allow_nan=False)
