"""Runs `fedlora config`: every key, its value and what it does; or their JSON Schema."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import CONFIGURATION, Option, Syntax, take
from fedlora.config.config import Config
from fedlora.config.schema import config_schema
from fedlora.config.sources import settings
from fedlora.errors import InputError

HELP = """\
fedlora config [CONFIG.yaml | embedded] [--key value ...] [--json]
fedlora config --schema
fedlora config [CONFIG.yaml | embedded] [--key value ...] --flower_app DIR

Prints every configuration key with its value (its default where none is given) and one line on
what it does. The output is a configuration file. `fedlora config embedded` prints the one that
`fedlora run` uses when it is given none.

  --json     key and value as one JSON object, without the explanations
  --schema   the JSON Schema (draft 2020-12) of a configuration, from which editors complete and
             check a YAML file that says where it lies:
               fedlora config --schema > fedlora.schema.json
               # yaml-language-server: $schema=fedlora.schema.json
  --flower_app DIR
             write the app that Flower's own command runs, with every key as its run-config:
               flwr run DIR --stream --run-config 'num_rounds=5 client_ranks="8 4 2"'
"""
SYNTAX = Syntax(
    {
        "schema": Option("the JSON Schema of a configuration", flag=True),
        "flower_app": Option("a directory for the app that flwr run takes", path="directory"),
    },
    CONFIGURATION,
    keys=True,
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora config`."""
    own = take(arguments, SYNTAX)
    if own["schema"]:
        if arguments:
            raise InputError(f"{arguments[0]}: --schema is the same for all; give it alone")
        schema = config_schema()
        if emit:
            emit(schema)
        else:
            print(json.dumps(schema, indent=2))
        return 0
    values = settings(arguments, None)
    config = Config(**values)
    if own["flower_app"] is not None:
        meant = {key: x for key, x in config.flat().items() if key in values and key != "engine"}
        return _write_app(Path(own["flower_app"]), meant, emit)
    if emit:
        emit(config.flat())
    else:
        print(config.to_yaml(comments=True), end="")
    return 0


def _write_app(directory: Path, values: Mapping[str, Any], emit: Emit | None) -> int:
    """Write the app for Flower, with the keys that were given."""
    from fedlora.engines.flower.run_config import write_bundle

    write_bundle(directory, values)
    if emit:
        emit({"app": str(directory)})
    else:
        print(f"flwr run {shlex.quote(str(directory))} --stream")
    return 0
