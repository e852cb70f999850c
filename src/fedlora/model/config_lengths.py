"""Finds the numbers of a model's configuration that may be lengths.

There is no list of what all architectures call their windows, chunks and tables of positions. So
every whole number of a configuration is looked at, except those known to be something else by their
name, or because a parameter has that width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlora.model.trial_rows import LENGTHS

UNBOUNDED = 2**62
"""Stands for a pass without a limit."""

_POSITIONS = re.compile(r"position|n_ctx|seq_?len|sequence_len|max_len|context")
_LENGTHS = re.compile(
    r"window|chunk|block_size|local_attention|span|stride|segment|distance|floor|index_topk"
)
_NO_LENGTHS = re.compile(
    r"^d_|cap$|capping|clip|depth|idx|rate|types$|shape|bins|mamba|dim|hidden|width|vocab|token|theta|base|rank|num_|^n_|layer|head|expert|channel|feature|"
    r"version|seed|year|ids?$|label|bits|factor|param|size|group|state|inner|ffn|ff$|scal|"
    r"embed|eps|norm|kernel|loss|coef|iter|top_?k|alpha|beta|multiplier|image|audio|vision|patch"
)


def _numbers(config: Any, key: str = "") -> Iterable[tuple[str, int]]:
    """All whole numbers of a configuration beyond the lengths tried, with their keys."""
    if hasattr(config, "to_dict"):
        config = vars(config)
    if isinstance(config, Mapping):
        for name, value in config.items():
            if not str(name).startswith("_"):
                yield from _numbers(value, str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _numbers(value, key)
    elif isinstance(config, int | float) and not isinstance(config, bool):
        tried = min(LENGTHS)
        if config == config and abs(config) < UNBOUNDED and int(config) == config > tried:
            yield key.lower(), int(config)


def positions_of(config: Any) -> list[int]:
    """The numbers of a configuration that are called a number of positions, ascending."""
    return sorted({n for key, n in _numbers(config) if _POSITIONS.search(key)})


def longest_table(config: Any) -> int:
    """The number of positions a model must be able to run; 0 where its configuration has none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    tables = [getattr(text, name, None) for name in names]
    return max((n for n in tables if isinstance(n, int)), default=0)


def smallest_unexplained(model: Any, configs: Sequence[Any], windows: set[int]) -> int:
    """The smallest number of a model's configurations that may be an unknown kind of length.

    Numbers are explained where they are widths of parameters, or the windows and chunks of masks
    that the model has asked for.

    Args:
        model: a transformers model.
        configs: its own configuration and those of its parts.
        windows: sizes of the masks that it has asked for.

    Returns:
        `UNBOUNDED` where every number is explained.
    """
    widths = {size for p in model.parameters() for size in p.shape}

    def bounds(key: str, n: int) -> bool:
        if _POSITIONS.search(key) or "layer" in key:
            return False
        if any(abs(n - times * w) <= 1 for w in windows for times in (1, 2)):
            return False
        if _LENGTHS.search(key):
            return True
        return not _NO_LENGTHS.search(key) and n not in widths

    unexplained = (n for config in configs for key, n in _numbers(config) if bounds(key, n))
    return min((n for n in unexplained if n > max(LENGTHS)), default=UNBOUNDED)
