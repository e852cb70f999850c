"""Collects what a report of run directories shows."""

from __future__ import annotations

from pathlib import Path

from fedlora.commands.report.collect import Collected, collect
from fedlora.commands.report.reading import find_runs, names_of, read_run
from fedlora.commands.report.spectrum import read_spectrum


def collected(*paths: Path) -> Collected:
    """What a report of these directories shows."""
    found = find_runs([str(path) for path in paths])
    runs = [read_run(path, name) for path, name in zip(found, names_of(found), strict=True)]
    return collect(runs, [read_spectrum(path) for path in found])
