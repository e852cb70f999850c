"""Joins runs that differ by their seed alone into one series with a mean and a band around it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.report.reading import Run
from fedlora.sources import rule_keys

APART = ("seed", "output_dir", "report_to", "run_name", "num_threads", "cohort_size")
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
    found = [[run[number] for run in values if number in run] for number in rounds]
    return Curve(
        tuple(rounds),
        tuple(statistics.fmean(x) for x in found),
        tuple(statistics.stdev(x) if len(x) > 1 else None for x in found),
        tuple(map(len, found)),
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


def group(runs: Sequence[Run]) -> list[Series]:
    """Series in the order in which their first runs are given."""
    groups: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        # A run without a configuration is like no other.
        same = {k: x for k, x in run.config.items() if k not in APART} or {"run": run.name}
        groups.setdefault(_text(same), []).append(i)
    parts: list[list[int]] = []
    for members in groups.values():
        seeds = [runs[i].seed for i in members]
        # The same seed twice is not a repetition: something else differs that is not written.
        parts += [members] if len(set(seeds)) == len(seeds) else [[i] for i in members]
    keys = differing([runs[members[0]].config for members in parts if runs[members[0]].config])
    labels = [_label(runs[members[0]], keys) for members in parts]
    return [
        Series(
            f"{label} ({runs[members[0]].name})" if labels.count(label) > 1 else label,
            tuple(members),
        )
        for label, members in zip(labels, parts, strict=True)
    ]


def _label(run: Run, keys: Sequence[str]) -> str:
    if not run.config:
        return run.name
    own = [
        f"{key} {_brief(run.config[key])}"
        for key in keys
        if key != "method" and run.config.get(key) is not None
    ]
    if len(own) > 3:
        return f"{run.method} ({run.name})" if "method" in keys else run.name
    named = "method" in keys or not own
    return ", ".join([run.method] * named + own)


def _brief(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 28 else f"{text[:25]}..."


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
