"""Makes the JSON Schema of a configuration, from which editors complete and check YAML files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_type_hints

from fedlora.config.config import CLIENT_KEYS, Config
from fedlora.config.errors_in_words import members
from fedlora.config.keys import NONE, JsonSchema, Schema, annotation_of
from fedlora.config.rule_options import option_line, rules_by_option
from fedlora.methods import METHODS


def config_schema() -> Schema:
    """Every key with its description, default, values and bounds (JSON Schema, draft 2020-12).

    What holds between keys is checked by `Config` alone, but for a rule's options: these are
    refused beside another rule.
    """
    keys = _keys()
    only = [_belongs(key, rules) for key, rules in rules_by_option().items()]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fedlora configuration",
        "description": "what `fedlora run` reads; `fedlora config` prints every key",
        "type": "object",
        "properties": keys,
        "additionalProperties": False,
        "allOf": only,
    }


def _keys() -> dict[str, Schema]:
    """Every key's own schema: the configuration's keys, then the rules' options."""
    generated = Config.model_json_schema()["properties"]
    out: dict[str, Schema] = {}
    for key, field in Config.model_fields.items():
        if key == "method_options":
            continue
        about = {"title": key, "description": field.description, "default": field.default}
        declared = annotation_of(Config, key, JsonSchema)
        own = declared.schema if declared else _lenient(generated[key], field.annotation)
        out[key] = {**about, **own}
    out["client_overrides"] |= _overrides(out)
    for key, rules in rules_by_option().items():
        options = METHODS[rules[0]].options
        option = next(f for f in dataclasses.fields(options) if f.name == key)
        out[key] = {
            "title": key,
            "description": f"{option_line(options, key)} (method {', '.join(rules)})",
            "default": option.default,
            **_option(get_type_hints(options)[key], option.metadata.get("bounds", {})),
        }
    out["method_options"] = {
        "title": "method_options",
        "description": str(Config.model_fields["method_options"].description),
        "type": "object",
    }
    return out


def _option(annotation: Any, bounds: Mapping[str, float]) -> Schema:
    """An option of a rule: a number within its bounds, or none where its type says so."""
    kinds = members(annotation)
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum"}
    number = {
        "type": "integer" if int in kinds else "number",
        **{names[bound]: value for bound, value in bounds.items()},
    }
    return {"anyOf": [number, {"type": "null"}]} if NoneType in kinds else number


def _lenient(generated: Mapping[str, Any], annotation: Any) -> Schema:
    """What pydantic says of a key, and what the configuration reads beside it.

    One value where a list is wanted is a list of one, and the text none is none.
    """
    kinds: list[Schema] = [dict(x) for x in generated.get("anyOf", [])]
    if not kinds:
        described = ("title", "description", "default")
        return {k: v for k, v in generated.items() if k not in described}
    of_list = [x["items"] for x in kinds if x.get("type") == "array"]
    optional = NoneType in members(annotation)
    kinds = [x for x in kinds if x.get("type") != "null"]
    if of_list and len(members(annotation)) == 2 and optional:
        kinds += of_list
    if optional or {"type": "null"} in generated.get("anyOf", []):
        kinds.append(NONE)
    return {"anyOf": kinds}


def _overrides(keys: Mapping[str, Schema]) -> Schema:
    """The settings of single clients: by number, or a pattern of files."""
    own = {key: {"$ref": f"#/properties/{key}"} for key in CLIENT_KEYS}
    client = {"type": "object", "properties": own, "additionalProperties": False}
    return {
        "anyOf": [
            {
                "type": "object",
                "patternProperties": {r"^\d+$": client},
                "additionalProperties": False,
            },
            {"type": "string"},
            NONE,
        ]
    }


def _belongs(key: str, rules: list[str]) -> Schema:
    """An option stands beside a rule that has it; without a method, the default rule is meant."""
    default = Config.model_fields["method"].default
    method: Schema = {"properties": {"method": {"enum": rules}}}
    if default not in rules:
        method["required"] = ["method"]
    return {"if": {"required": [key]}, "then": method}
