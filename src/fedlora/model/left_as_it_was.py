"""Undoes what a training of the user's own does to a model beside changing its parameters.

The base stays in memory from round to round, and other people's trainers change a model in ways
they do not take back: TRL replaces `forward` and sets dropout to 0, transformers turns on gradient
checkpointing, others add hooks or layers of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """A context after which a model's modules have the attributes that they have now.

    Its parameters keep what was learnt. The attributes of `config` and `generation_config` are
    restored with the modules'.

    Args:
        model: of transformers, or any module.
    """
    modules = {id(module): (module, _attributes(module)) for module in model.modules()}
    configs = {
        id(config): (config, copy.deepcopy(vars(config)))
        for module, _ in modules.values()
        for key in ("config", "generation_config")
        if hasattr(config := getattr(module, key, None), "__dict__")
    }
    try:
        yield
    finally:
        for module, before in modules.values():
            _restore(module, before)
        for config, values in configs.values():
            vars(config).clear()
            vars(config).update(values)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's attributes, each dictionary among them with a copy of what it holds."""
    return {
        key: (value, copy.copy(value) if isinstance(value, dict) else None)
        for key, value in vars(module).items()
        if key != "_parameters"  # what is learnt stays, even where it is a new object
    }


def _restore(module: nn.Module, before: Mapping[str, Any]) -> None:
    attributes = vars(module)
    for key in [key for key in attributes if key not in before and key != "_parameters"]:
        del attributes[key]
    for key, (value, held) in before.items():
        if held is not None:  # handles of hooks know this very dictionary
            value.clear()
            value.update(held)
        attributes[key] = value
