"""Runs `fedlora demo`: three methods and every client alone, one table and one picture."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotext
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.config import Config
from fedlora.console import human_bytes, reporter
from fedlora.demo import CONFIG
from fedlora.engines.local import Result, run_session
from fedlora.errors import InputError
from fedlora.setup import alone, assemble
from fedlora.sources import layered, read_yaml

COMPARED = ("exact", "flora", "zero_pad")
METRIC = "exact_match"
FIXED = ("method", "eval_rounds", "eval_exact_match", "early_stopping_patience")


def _free_directory(wanted: str) -> Path:
    """The wanted directory, or the first of its name with a number that does not exist."""
    path, number = Path(wanted), 2
    while path.exists():
        path, number = Path(f"{wanted}-{number}"), number + 1
    return path


def demo(overrides: Mapping[str, Any]) -> dict[str, list[float]]:
    """Run the demonstration and show it.

    Args:
        overrides: configuration keys that go to every run; `output_dir` holds all of them.

    Returns:
        Exact match (share of held-out rows) by round, for every method and for clients alone
        (their mean and the best of them).
    """
    values = layered(read_yaml(CONFIG), overrides)
    for key in FIXED:
        if key in overrides:
            raise InputError(
                f"{key}: the demo compares {', '.join(COMPARED)} by exact match in every round; "
                "for another comparison use fedlora run"
            )
    where = _free_directory(str(values.pop("output_dir", "fedlora-demo")))
    console, began = Console(), time.perf_counter()
    curves: dict[str, list[float]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    configs = {
        method: Config(**layered(values, {"method": method, "output_dir": str(where / method)}))
        for method in COMPARED
    }
    for method, config in configs.items():
        session = assemble(config)
        console.print(Text(f"\n{method}", style="bold"))
        with reporter(False, console, f"{method}: ") as report:
            result = run_session(session, report=report)
        curves[method] = _curve(result)
        rounds = [line for line in result.metrics if line["event"] == "round"]
        sizes[method] = (
            sum(line["bytes_up"] for line in rounds),
            sum(line["bytes_down"] for line in rounds),
        )
    console.print("\neach client alone, on its own rows")
    singles = []
    for client, rank in enumerate(session.federation.ranks):
        rows = session.federation.num_examples[client]
        name = f"client {client}, rank {rank:>2}, {rows:>4} rows"
        if not rows:
            continue
        with console.status(name):
            singles.append(_curve(run_session(alone(session, client, where / f"alone-{client}"))))
        console.print(f"  {name}: {singles[-1][-1]:.1%}", highlight=False)
    by_round = list(zip(*singles, strict=True))
    curves["alone mean"] = [sum(values) / len(singles) for values in by_round]
    curves["alone best"] = [max(values) for values in by_round]
    console.print()
    console.print(_table(curves, sizes))
    console.print(_picture(curves), highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"{time.perf_counter() - began:.0f} s; everything is in {where}/. Next:\n"
        f"{f'  fedlora report {where}':<52}a page of these runs\n"
        "  fedlora run --num_rounds 10 --output_dir longer   the same for longer\n"
        "  fedlora config embedded > my.yaml                 its configuration, to edit\n"
        "  fedlora run --help                                your own model and data",
        highlight=False,
        markup=False,
    )
    return curves


def _curve(result: Result) -> list[float]:
    return [found[METRIC] for _, found in sorted(result.evaluations.items())]


def _table(curves: Mapping[str, list[float]], sizes: Mapping[str, tuple[int, int]]) -> Table:
    table = Table(title="exact match on held-out instructions, by round", box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for number in range(len(next(iter(curves.values())))):
        table.add_column(str(number), justify="right")
    table.add_column("up", justify="right")
    table.add_column("down", justify="right")
    for name, values in curves.items():
        traffic = [human_bytes(size) for size in sizes.get(name, ())] or ["-", "-"]
        table.add_row(name, *(f"{value:.1%}" for value in values), *traffic)
    return table


def _picture(curves: Mapping[str, list[float]]) -> str:
    """A plot of text, without colours."""
    figure = plotext.figure
    figure.clear()
    figure.theme("clear")
    figure.plot_size(78, 18)
    for (name, values), marker in zip(curves.items(), "●xo+.", strict=False):
        signal = figure.signal(
            list(range(len(values))), [100 * value for value in values], marker=marker
        )
        signal.lines()
        signal.label(name)
        figure.draw(signal)
    figure.title("exact match (%) by round")
    figure.ruler(0, 0).ticks(list(range(len(next(iter(curves.values()))))))
    return Text.from_ansi(str(figure.build())).plain
