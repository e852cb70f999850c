"""What carrying costs, engine by engine: one table.

    .venv/bin/python benchmarks/engines.py                      # all engines, some minutes each
    .venv/bin/python benchmarks/engines.py flower               # one of them
    .venv/bin/python benchmarks/engines.py nvflare --quick      # fewer and smaller messages

Every engine deploys itself on loopback with TLS and three sites whose workers send back what they
get, so that what is measured is the engine alone. `engines_ENGINE.py` measures an engine: its
`measures(quick)` gives cases and figures, one after the other. Prints a line for each and then the
table, and writes that to benchmarks/results/engines.md. Times mean something on a quiet machine
alone.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "engines.md"
ENGINES = ("nvflare", "flower")


def measures(engine: str, quick: bool) -> Iterator[tuple[str, str]]:
    """Cases of an engine and their figures, in words."""
    module: Any = import_module(f"engines_{engine}")
    yield from module.measures(quick)


def table(figures: Mapping[str, Mapping[str, str]]) -> str:
    """The table of all engines: a row for each case, in the order in which they came first."""
    cases = list(dict.fromkeys(case for column in figures.values() for case in column))
    lines = [f"| case | {' | '.join(figures)} |", "|---|" + "---|" * len(figures)]
    for case in cases:
        lines.append(f"| {case} | {' | '.join(x.get(case, '-') for x in figures.values())} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the engines that are asked for."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    there = [name for name in ENGINES if find_spec(f"engines_{name}")]
    parser.add_argument("engines", nargs="*", default=there, choices=there)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller messages")
    options = parser.parse_args()
    figures: dict[str, dict[str, str]] = {}
    for engine in options.engines:
        figures[engine] = {}
        for case, figure in measures(engine, options.quick):
            figures[engine][case] = figure
            print(f"{engine:<8} {case:<60} {figure}", flush=True)
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(f"\n{table(figures)}", end="")
    RESULTS.write_text(f"Made by benchmarks/engines.py on {machine}.\n\n{table(figures)}")


if __name__ == "__main__":
    main()
