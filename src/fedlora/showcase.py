"""`fedlora demo`: three methods and every client alone, one table, one picture."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotext
from rich.console import Console
from rich.table import Table

from fedlora.config import Config, layered, read_yaml
from fedlora.console import Terminal, human_bytes
from fedlora.demo import CONFIG
from fedlora.engines.local import Event, Report, Result, run_session
from fedlora.errors import InputError
from fedlora.setup import Session, assemble

METHODS = ("exact", "flora", "zero_pad")
METRIC = "exact_match"


def alone(session: Session, client: int, output_dir: Path) -> Session:
    """The session of one client that trains by itself: same rows, steps and rank, nobody to ask."""
    data, spec = session.data, session.federation
    rank = spec.ranks[client]
    config = session.config.model_copy(
        update={
            "method": "fedit",  # with one client: go on training the same adapter
            "method_options": {},
            "num_clients": 1,
            "client_ranks": [rank],
            "output_dir": str(output_dir),
            "save_total_limit": 2,
        }
    )
    return replace(
        session,
        config=config,
        data=replace(data, clients=(data.clients[client],)),
        federation=replace(spec, ranks=[rank], num_examples=[spec.num_examples[client]]),
    )


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
        Exact match (share of held-out rows) by round, for every method and for "alone" (the mean
        over the clients).
    """
    values = layered(read_yaml(CONFIG), overrides)
    if "method" in values:
        raise InputError(f"method: the demo runs {', '.join(METHODS)}; use fedlora run for one")
    where = _free_directory(str(values.pop("output_dir", "fedlora-demo")))
    console, began = Console(), time.perf_counter()
    results: dict[str, Result] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for method in METHODS:
        config = Config.of({**values, "method": method, "output_dir": str(where / method)})
        console.print(f"\n[bold]{method}[/]" if console.is_terminal else f"\n{method}")
        session = assemble(config)
        results[method] = _shown(session, console, f"{method}: ")
        rounds = [line for line in results[method].metrics if line["event"] == "round"]
        sizes[method] = (
            sum(line["bytes_up"] for line in rounds),
            sum(line["bytes_down"] for line in rounds),
        )
    curves = {method: _curve(result) for method, result in results.items()}
    clients = len(session.data.clients)
    console.print("\neach client alone, on its own rows")
    singles = []
    for client in range(clients):
        lone = alone(session, client, where / f"alone-{client}")
        singles.append(_curve(_shown(lone, console, f"client {client} alone: ", quiet=True)))
        console.print(
            f"  client {client}, rank {session.federation.ranks[client]:>2}, "
            f"{session.federation.num_examples[client]:>4} rows: {singles[-1][-1]:.1%}",
            highlight=False,
        )
    curves["alone"] = [sum(values) / clients for values in zip(*singles, strict=True)]
    console.print()
    console.print(_table(curves, sizes, max(single[-1] for single in singles)))
    _picture(curves)
    console.print(
        f"{time.perf_counter() - began:.0f} s; everything is in {where}/. Next:\n"
        "  fedlora run --num_rounds 10 --output_dir longer   the same federation for longer\n"
        "  fedlora config embedded > my.yaml                 its configuration, to edit\n"
        "  fedlora run --help                                your own model and data",
        highlight=False,
        markup=False,
    )
    return curves


def _shown(session: Session, console: Console, title: str, quiet: bool = False) -> Result:
    if not console.is_terminal:
        from fedlora.console import plain_lines

        return run_session(session, report=_nothing if quiet else plain_lines)
    with Terminal(console, title) as terminal:
        return run_session(session, report=_bars_only(terminal) if quiet else terminal)


def _nothing(event: Event) -> None:
    """Says nothing."""


def _bars_only(terminal: Terminal) -> Report:
    """A terminal without the introduction and the table."""
    console = terminal.console

    def report(event: Event) -> None:
        console.quiet = event["event"] in ("begin", "start", "round")
        terminal(event)
        console.quiet = False

    return report


def _curve(result: Result) -> list[float]:
    return [found[METRIC] for _, found in sorted(result.evaluations.items())]


def _table(
    curves: Mapping[str, list[float]], sizes: Mapping[str, tuple[int, int]], best_alone: float
) -> Table:
    table = Table(title="exact match on held-out instructions, by round")
    table.add_column("method")
    for number in range(len(next(iter(curves.values())))):
        table.add_column(str(number), justify="right")
    table.add_column("sent up", justify="right")
    table.add_column("sent down", justify="right")
    for name, values in curves.items():
        up, down = sizes.get(name, (None, None))
        label = f"alone (mean; best {best_alone:.1%})" if name == "alone" else name
        table.add_row(
            label,
            *(f"{value:.1%}" for value in values),
            "-" if up is None else human_bytes(up),
            "-" if down is None else human_bytes(down),
        )
    return table


def _picture(curves: Mapping[str, list[float]]) -> None:
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(78, 20)
    for name, marker in zip(curves, ("dot", "x", "o", "+"), strict=False):
        values = [100 * value for value in curves[name]]
        plotext.plot(list(range(len(values))), values, label=name, marker=marker)
    plotext.title("exact match (%) by round")
    plotext.xlabel("round")
    plotext.xticks(list(range(len(next(iter(curves.values()))))))
    plotext.show()
