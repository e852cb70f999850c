"""Puts a configuration's sources over each other: a file, and the command line over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.config.arguments import parse_overrides
from fedlora.config.yaml_file import read_yaml
from fedlora.embedded import CONFIG as EMBEDDED_CONFIG
from fedlora.embedded import EMBEDDED
from fedlora.methods import METHODS, rule_keys

_ENGINE_OF = {"sites": "sites", "kit": "nvflare", "num_workers": "workers"}  # key -> its engine


def layered(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers over earlier ones.

    A later source of data replaces an earlier one, a later method drops the options of an earlier
    one that it does not have, and a later engine drops what belongs to another.
    """
    out: dict[str, Any] = {}
    for layer in layers:
        if (rule := METHODS.get(str(layer.get("method")))) is not None:
            its = {f.name for f in dataclasses.fields(rule.options)}
            out = {key: x for key, x in out.items() if key not in rule_keys() - its}
        if (engine := layer.get("engine")) is not None:
            out = {key: x for key, x in out.items() if _ENGINE_OF.get(key, engine) == engine}
        for one, other in (("train_file", "dataset_name"), ("dataset_name", "train_file")):
            if layer.get(one) and other not in layer:
                out.pop(other, None)
        out.update(layer)
    return out


def settings(arguments: Sequence[str], default: str | None) -> dict[str, Any]:
    """Flat keys from `[CONFIG] [--key value ...]`."""
    source = default
    named = bool(arguments) and not arguments[0].startswith("--")
    if named:
        source, arguments = arguments[0], arguments[1:]
    overrides = parse_overrides(arguments)
    own = (overrides.get(key) for key in ("model_name_or_path", "dataset_name", "train_file"))
    if source == EMBEDDED and not named and any(x not in (None, EMBEDDED) for x in own):
        source = None  # the embedded ranks, division and learning rate belong to what is embedded
    base: dict[str, Any] = {}
    if source is not None:
        base = read_yaml(EMBEDDED_CONFIG if source == EMBEDDED else source)
    return layered(base, overrides)
