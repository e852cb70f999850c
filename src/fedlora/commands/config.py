"""Runs `fedlora config`: every key, its value and what it does; or their JSON Schema."""

from __future__ import annotations

import json

from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import CONFIGURATION, Option, Syntax, take
from fedlora.config.config import Config
from fedlora.config.schema import config_schema
from fedlora.config.sources import settings
from fedlora.errors import InputError

HELP = """\
fedlora config [CONFIG.yaml | embedded] [--key value ...] [--json]
fedlora config --schema

Prints every configuration key with its value (its default where none is given) and one line on
what it does. The output is a configuration file. `fedlora config embedded` prints the one that
`fedlora run` uses when it is given none.

  --json     key and value as one JSON object, without the explanations
  --schema   the JSON Schema (draft 2020-12) of a configuration, from which editors complete and
             check a YAML file that says where it lies:
               fedlora config --schema > fedlora.schema.json
               # yaml-language-server: $schema=fedlora.schema.json
"""
SYNTAX = Syntax(
    {"schema": Option("the JSON Schema of a configuration", flag=True)}, CONFIGURATION, keys=True
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora config`."""
    if take(arguments, SYNTAX)["schema"]:
        if arguments:
            raise InputError(f"{arguments[0]}: --schema is the same for all; give it alone")
        schema = config_schema()
        if emit:
            emit(schema)
        else:
            print(json.dumps(schema, indent=2))
        return 0
    config = Config(**settings(arguments, None))
    if emit:
        emit(config.flat())
    else:
        print(config.to_yaml(comments=True), end="")
    return 0
