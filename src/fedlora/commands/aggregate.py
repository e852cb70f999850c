"""Runs `fedlora aggregate`: PEFT adapters of any ranks become one."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from fedlora.commands.console import quiet_libraries
from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import Option, Syntax, parse_overrides
from fedlora.errors import InputError
from fedlora.methods import METHODS, ONE_SHOT

if TYPE_CHECKING:
    from fedlora.adapters.aggregate import Aggregated

HELP = """\
fedlora aggregate DIR [DIR ...] --output DIR [--weights W ...] [--method METHOD]
                  [--rank R | --energy E] [--same_base] [--option value ...] [--json]

Combines PEFT LoRA directories of one base model, of whatever ranks, alphas and target modules, into
one: by default exactly their weighted sum. No base model is loaded. Ends with a table: the rank of
every layer in each adapter and in the result, and the relative error against the weighted sum.

  --weights 0.5 0.3 0.2   one for each adapter, normalised; without it all alike
  --method METHOD         METHODS_HERE
  --rank R                keep at most R singular directions of each layer
  --energy 0.99           keep the fewest that hold this share of the squared singular values
  --same_base             bases under different names or paths are one: no warning
  --json                  one JSON object: adapters, their weights, rank and error of every layer

A classifier's rows are matched by the label names in a config.json beside each adapter (or in the
base's, where that is here): another order is sorted out, and the result has all labels.

Example:
  fedlora aggregate hospital-a/ hospital-b/ --weights 3 1 --energy 0.99 --output both/

In Python:
  from fedlora import aggregate, load_adapter, save_adapter
  save_adapter("both", aggregate([load_adapter("hospital-a"), load_adapter("hospital-b")], [3, 1]))
""".replace("METHODS_HERE", f"\n{' ' * 26}".join(textwrap.wrap(", ".join(ONE_SHOT), 70)))
SYNTAX = Syntax(
    {
        "output": Option("a new directory", path="directory"),
        "weights": Option("one for each adapter", many=True),
        "method": Option("how they are combined", values=ONE_SHOT),
        "rank": Option("singular directions of each layer, at most"),
        "energy": Option("share of the squared singular values to keep"),
        "same_base": Option("bases under different names or paths are one", flag=True),
        **{
            field.name: Option(f"of {name}")
            for name in ONE_SHOT
            for field in fields(METHODS[name].options)
        },
    },
    Option("PEFT directories", many=True, path="directory"),
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora aggregate`."""
    first = next((i for i, x in enumerate(arguments) if x.startswith("--")), len(arguments))
    paths, given = arguments[:first], parse_overrides(arguments[first:])
    output = given.pop("output", None)
    if not paths or not isinstance(output, str):
        raise InputError("aggregate: give PEFT directories and --output DIR, a new directory")
    quiet_libraries()
    from rich.console import Console

    from fedlora.adapters.aggregate import aggregate, check_output, save_adapter
    from fedlora.adapters.saved_adapter import load_adapter
    from fedlora.commands.views.layers import show_layers

    check_output(output)
    weights = _weights(given.pop("weights", None))
    same_base = _same_base(given.pop("same_base", False))
    options = _options(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they stand below the table
        merged = aggregate(
            [load_adapter(path) for path in paths],
            None if weights is None else [number("weights", weight) for weight in weights],
            same_base=same_base,
            **options,
        )
    save_adapter(output, merged)
    if emit:
        emit(_result(merged, paths, output))
        return 0
    show_layers(merged, paths, Console())
    print(f"written and read back: {output}")
    return 0


def _weights(given: Any) -> list[Any] | None:
    """The weights as they stand on the command line."""
    if given is True:
        raise InputError("--weights: give one for each adapter")
    return given if isinstance(given, list) or given is None else [given]


def _same_base(given: Any) -> bool:
    if isinstance(given, bool):
        return given
    if str(given).lower() not in ("true", "false"):
        raise InputError(f"--same_base: is given alone, without {given}")
    return str(given).lower() == "true"


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The method, the limit of the result's rank and the method's options, as numbers."""
    from fedlora.adapters.aggregate import check_options

    method = given.get("method", "exact")
    options: dict[str, Any] = {"method": method if isinstance(method, str) else "(none given)"}
    others = {key: value for key, value in given.items() if key != "method"}
    check_options(options["method"], [key for key in others if key not in ("rank", "energy")])
    for key, value in others.items():
        if value is True:
            raise InputError(f"--{key}: give a number")
        options[key] = None if value is None else number(key, value)
    rank = options.get("rank")
    if rank is not None and not float(rank).is_integer():
        raise InputError(f"rank: {rank} is no whole number")
    options["rank"] = None if rank is None else int(rank)
    return options


def _result(merged: Aggregated, paths: list[str], output: str) -> dict[str, Any]:
    """What became of every layer, as a program reads it."""
    weighted = zip(paths, merged.weights, strict=True)
    return {
        "event": "aggregate",
        "adapters": [{"path": path, "weight": weight} for path, weight in weighted],
        "layers": {name: asdict(layer) for name, layer in merged.layers.items()},
        "saved_whole": list(merged.dense),
        "notes": list(merged.notes),
        "output": output,
    }


def number(key: str, text: Any) -> float:
    """A number from the command line.

    Raises:
        InputError: it is none.
    """
    try:
        return float(text)
    except (TypeError, ValueError):
        raise InputError(f"{key}: {text!r} is no number") from None
