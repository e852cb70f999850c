"""Joins runs that differ by their seed alone into one series with a mean and a band around it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.commands.run_files import Run, whole
from fedlora.config.config import Config
from fedlora.config.keys import Mark, keys_marked
from fedlora.methods import rule_keys

APART = keys_marked(Config, Mark.OUTPUT, Mark.REPETITION, Mark.MACHINE)
"""Keys that make no other experiment of a run."""


@dataclass(frozen=True)
class Series:
    """Runs of one configuration.

    Args:
        label: what tells it from the others.
        runs: their places in the list of runs.
    """

    label: str
    runs: tuple[int, ...]


@dataclass(frozen=True)
class Curve:
    """A measure by round over the runs of a series.

    Args:
        rounds: ascending.
        mean: over the runs that have the round.
        sd: their standard deviation (n - 1); None where there is one run.
        count: how many runs have the round.
    """

    rounds: tuple[int, ...]
    mean: tuple[float, ...]
    sd: tuple[float | None, ...]
    count: tuple[int, ...]


def curve(values: Sequence[Mapping[int, float]]) -> Curve:
    """Round -> value of several runs as their mean and deviation."""
    rounds = sorted(set().union(*values)) if values else []
    by_round = [[run[number] for run in values if number in run] for number in rounds]
    return Curve(
        tuple(rounds),
        tuple(statistics.fmean(x) for x in by_round),
        tuple(statistics.stdev(x) if len(x) > 1 else None for x in by_round),
        tuple(map(len, by_round)),
    )


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values differ, `method` first; a rule's options only within one method."""
    options = rule_keys()
    keys = dict.fromkeys(key for config in configs for key in config)
    out = []
    for key in keys:
        if key in APART:
            continue
        if key in options:
            by_method: dict[str, set[str]] = {}
            for config in configs:
                by_method.setdefault(str(config.get("method")), set()).add(_text(config.get(key)))
            differs = any(len(values) > 1 for values in by_method.values())
        else:
            differs = len({_text(config.get(key)) for config in configs}) > 1
        if differs:
            out.append(key)
    return sorted(out, key=lambda key: key != "method")


def written(run: Run) -> dict[str, Any]:
    """The configuration as the user wrote it: what a run settles by itself is put back.

    Ranks drawn by the seed, a measured dtype and the like are not alike in two runs that differ by
    their seed alone. A client alone is described by its number.
    """
    config, client = run.written, lone(run)
    if client is None:
        return config
    apart = {*keys_marked(Config, Mark.ALONE), *rule_keys()}
    return {"alone": client, **{k: x for k, x in config.items() if k not in apart}}


def lone(run: Run) -> int | None:
    """The client that trained by itself in this run; None: a federation."""
    return whole(run.begin.get("alone"))


def group(runs: Sequence[Run]) -> list[Series]:
    """Series in the order in which their first runs are given."""
    groups: list[list[int]] = []
    of: dict[str, list[int]] = {}  # a configuration, as it was settled or written -> its group
    for i, run in enumerate(runs):
        # A run without a configuration is like no other.
        names = [_text(x) for x in _descriptions(run)] if run.config else []
        joined = next((of[name] for name in names if name in of), None)
        if joined is None:
            groups.append(joined := [])
        joined.append(i)
        for name in names:
            of.setdefault(name, joined)
    parts: list[list[int]] = []
    for members in groups:
        seeds = [runs[i].seed for i in members]
        # The same seed twice is not a repetition: something else differs that is not written.
        parts += [members] if len(set(seeds)) == len(seeds) else [[i] for i in members]
    firsts = [runs[members[0]] for members in parts]
    keys = {
        alone: differing([written(x) for x in firsts if x.config and (lone(x) is None) != alone])
        for alone in (True, False)
    }
    labels = [_label(run, keys[lone(run) is not None]) for run in firsts]
    return [
        Series(f"{label} ({run.name})" if labels.count(label) > 1 else label, tuple(members))
        for label, run, members in zip(labels, firsts, parts, strict=True)
    ]


def _descriptions(run: Run) -> list[Any]:
    """What a run is known by: its configuration as written, and as settled.

    Either makes one series of two runs: `lora_r: 8` and `client_ranks: [8, 8]` are one thing. Ranks
    that the seed drew are like given ones by chance alone.
    """
    ours = written(run)
    both: list[tuple[str, dict[str, Any]]] = [("written", ours)]
    if not ours.get("rank_choices"):
        both.append(("settled", {**run.config, "alone": lone(run)}))
    return [[how, {k: x for k, x in config.items() if k not in APART}] for how, config in both]


def _label(run: Run, keys: Sequence[str]) -> str:
    if not run.config:
        return run.name
    config, client = written(run), lone(run)
    name = run.method if client is None else f"client {client} alone"
    own = [
        f"{key} {_brief(config[key])}"
        for key in keys
        if key not in ("method", "alone") and config.get(key) is not None
    ]
    if len(own) > 3:
        return f"{name} ({run.name})" if "method" in keys or client is not None else run.name
    named = "method" in keys or client is not None or not own
    return ", ".join([name] * named + own)


def _brief(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 28 else f"{text[:25]}..."


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
