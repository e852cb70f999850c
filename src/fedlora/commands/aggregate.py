"""Runs `fedlora aggregate`: adapters of any ranks become one, or their overlap is shown."""

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
from fedlora.methods import MERGES, METHODS, ONE_SHOT

if TYPE_CHECKING:
    from fedlora.adapters.aggregate import Aggregated
    from fedlora.adapters.saved_adapter import SavedAdapter

_OPTIONS: dict[str, Any] = {
    **{name: METHODS[name].options for name in ONE_SHOT},
    **{name: merge.options for name, merge in MERGES.items()},
}
"""Method -> the dataclass of its options."""


def _own_options(options: Any) -> str:
    """` (--density 0.9, --seed 0)`: the options that a merge has, and their defaults."""
    named = ", ".join(f"--{field.name} {field.default:g}" for field in fields(options))
    return f" ({named})" if named else ""


HELP = """\
fedlora aggregate DIR [DIR ...] --output DIR [--weights W ...] [--method METHOD]
                  [--raw_weights] [--rank R | --energy E] [--same_base] [--option value ...]
                  [--json]
fedlora aggregate DIR DIR [DIR ...] --overlap [--picture FILE] [--same_base] [--json]

Combines LoRA adapters of one base model, of whatever ranks, alphas and target modules, into one
PEFT directory: by default exactly their weighted sum. No base model is loaded. Ends with a table:
the rank of every layer in each adapter and in the result, and the relative error against the
weighted sum. Adapters can be PEFT's, MLX's and loralib's, and GGUF files.

  --weights 0.5 0.3 0.2   one for each adapter, normalised; without it all alike
  --raw_weights           take weights as they are; a negative one takes an adapter out again
  --method METHOD         a rule: METHODS_HERE
                          or a merge beyond sums:
MERGES_HERE
  --rank R                keep at most R singular directions of each layer
  --energy 0.99           keep the fewest that hold this share of the squared singular values
  --same_base             bases under different names or paths are one: no warning
  --overlap               combine nothing; show by layer how far the adapters change the same
                          directions: norms, shared energy, cosines, principal angles
  --picture FILE          the overlap as a picture, .png, .svg or .pdf
  --json                  one JSON object: adapters, their weights, rank and error of every layer

A classifier's rows are matched by the label names in a config.json beside each adapter (or in the
base's, where that is here): another order is sorted out, and the result has all labels.

Examples:
  fedlora aggregate hospital-a/ hospital-b/ --weights 3 1 --energy 0.99 --output both/
  fedlora aggregate hospital-a/ hospital-b/ --method ties --density 0.3 --output both/

In Python:
  from fedlora import aggregate, load_adapter, save_adapter
  save_adapter("both", aggregate([load_adapter("hospital-a"), load_adapter("hospital-b")], [3, 1]))
""".replace("METHODS_HERE", f"\n{' ' * 26}".join(textwrap.wrap(", ".join(ONE_SHOT), 70))).replace(
    "MERGES_HERE",
    "\n".join(
        textwrap.fill(
            f"{merge.name}: {merge.title}{_own_options(merge.options)}",
            98,
            initial_indent=" " * 28,
            subsequent_indent=" " * 30,
        )
        for merge in MERGES.values()
    ),
)
SYNTAX = Syntax(
    {
        "output": Option("a new directory", path="directory"),
        "weights": Option("one for each adapter", many=True),
        "raw_weights": Option("take weights as they are", flag=True),
        "method": Option("how they are combined", values=(*ONE_SHOT, *MERGES)),
        "rank": Option("singular directions of each layer, at most"),
        "energy": Option("share of the squared singular values to keep"),
        "same_base": Option("bases under different names or paths are one", flag=True),
        "overlap": Option("show how far adapters change the same directions", flag=True),
        "picture": Option("the overlap as a picture", path="file"),
        **{
            field.name: Option(f"of {name}")
            for name, options in _OPTIONS.items()
            for field in fields(options)
        },
    },
    Option("adapters: directories, or GGUF files", many=True, path="directory"),
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora aggregate`."""
    first = next((i for i, x in enumerate(arguments) if x.startswith("--")), len(arguments))
    paths, given = arguments[:first], parse_overrides(arguments[first:])
    if _flag(given, "overlap"):
        return _overlap(paths, given, emit)
    if "picture" in given:
        raise InputError("--picture: draws the overlap; give --overlap too")
    output = given.pop("output", None)
    if not paths or not isinstance(output, str):
        raise InputError("aggregate: give PEFT directories and --output DIR, a new directory")
    quiet_libraries()
    from rich.console import Console

    from fedlora.adapters.aggregate import aggregate, check_output, save_adapter
    from fedlora.commands.views.layers import show_layers

    check_output(output)
    weights = _weights(given.pop("weights", None))
    raw, same_base = _flag(given, "raw_weights"), _flag(given, "same_base")
    options = _options(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they stand below the table
        merged = aggregate(
            _loaded(paths),
            None if weights is None else [number("weights", weight) for weight in weights],
            raw_weights=raw,
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


def _loaded(paths: list[str]) -> list[SavedAdapter]:
    """The adapters, of whatever format."""
    from fedlora.adapters.any_format import load_adapter

    return [load_adapter(path) for path in paths]


def _overlap(paths: list[str], given: dict[str, Any], emit: Emit | None) -> int:
    """`fedlora aggregate --overlap`: nothing is combined."""
    same_base, file = _flag(given, "same_base"), given.pop("picture", None)
    if given:
        raise InputError(f"--overlap: combines nothing; leave out --{next(iter(given))}")
    if len(paths) < 2:
        raise InputError("--overlap: give two adapters or more")
    quiet_libraries()
    from rich.console import Console

    from fedlora.adapters.overlap import overlap
    from fedlora.commands.views.overlap import overlap_as_json, show_overlap
    from fedlora.commands.views.overlap_picture import draw_overlap
    from fedlora.commands.views.picture import check_picture

    picture = None if file is None else check_picture(str(file), "--picture")
    found = overlap(_loaded(paths), same_base=same_base)
    if picture is not None:
        draw_overlap(found, paths, picture)
    if emit:
        emit({**overlap_as_json(found, paths), "picture": None if picture is None else file})
        return 0
    show_overlap(found, paths, Console())
    if picture is not None:
        print(f"written: {picture}")
    return 0


def _weights(given: Any) -> list[Any] | None:
    """The weights as they stand on the command line."""
    if given is True:
        raise InputError("--weights: give one for each adapter")
    return given if isinstance(given, list) or given is None else [given]


def _flag(given: dict[str, Any], name: str) -> bool:
    """Whether a flag is given; it is taken out."""
    value = given.pop(name, False)
    if isinstance(value, bool):
        return value
    if str(value).lower() not in ("true", "false"):
        raise InputError(f"--{name}: is given alone, without {value}")
    return str(value).lower() == "true"


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The method, the limit of the result's rank and the method's options, as numbers."""
    from fedlora.adapters.combining import check_options

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
        "bases": merged.bases,
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
