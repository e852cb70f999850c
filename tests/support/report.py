"""Collects what a report of run directories shows."""

from __future__ import annotations

from pathlib import Path

from fedlora.commands.report.collect import Collected, collect
from fedlora.commands.report.reading import find_runs, names_of
from fedlora.commands.report.spectrum import read_spectrum
from fedlora.commands.run_files import read_run


def collected(*paths: Path) -> Collected:
    """What a report of these directories shows."""
    found = find_runs([str(path) for path in paths])
    runs = [read_run(path, name) for path, name in zip(found, names_of(found), strict=True)]
    return collect(runs, [read_spectrum(path) for path in found])
