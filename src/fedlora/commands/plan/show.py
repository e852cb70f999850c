"""Shows a plan in a terminal: a table of clients, one of methods, and the server in sentences."""

from __future__ import annotations

from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.commands.views.sentences import say
from fedlora.model.quantisation import held_in
from fedlora.runs.planning.plan import Plan, PlannedClient
from fedlora.text import human_bytes


def show_plan(plan: Plan, console: Console) -> None:
    """What a run would take."""
    config, federation = plan.session.config, plan.session.federation
    for warning in plan.session.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    say(
        console,
        f"{config.model_name_or_path}: {plan.parameters:,} parameters ({held_in(config)}), "
        f"{len(federation.shapes)} target modules; {config.num_rounds} rounds, "
        f"{len(federation.sample(1))} of {len(federation.ranks)} clients in each",
    )
    for choice in plan.session.choices:
        say(console, choice)
    console.print(_clients(plan))
    lacking = [str(client.client) for client in plan.clients if client.fits is False]
    if lacking:
        say(
            console,
            f"Too little memory: client {', '.join(lacking)}. Try client_ranks: auto, "
            "gradient_checkpointing: true, load_in_4bit: true, or a smaller max_length.",
        )
    if plan.no_memory:
        say(console, f"{plan.no_memory[:1].upper()}{plan.no_memory[1:]}.")
    console.print(_methods(plan))
    if plan.excluded:
        say(console, _excluded(plan.excluded))
    say(
        console,
        f"Server with {config.method}: {human_bytes(plan.server_memory)} of memory, "
        f"at most {human_bytes(plan.server_disk)} on disk.",
    )
    say(console, _time(plan))
    say(console, "No weights were read and nothing was written.")


def _clients(plan: Plan) -> Table:
    """Memory of each client; those that need and have the same share a line."""
    has_room = any(client.available is not None for client in plan.clients)
    table = _table(_about_memory(plan))
    table.add_column("client", no_wrap=True)
    names = ["rank", "batch", "base", "adapter", "AdamW", "pass", "all"]
    for name in [*names, *(["has"] if has_room else [])]:
        table.add_column(name, justify="right", no_wrap=True)
    for clients in _alike(plan):
        table.add_row(*_row(clients, has_room))
    return table


def _about_memory(plan: Plan) -> str:
    """The title, with what is the same for all."""
    libraries = {client.memory.libraries for client in plan.clients if client.memory is not None}
    title = "Memory of a client (batch: samples of a micro-batch"
    if not libraries:
        return f"{title})"
    return f"{title};\nall: with {human_bytes(max(libraries))} for Python and its libraries)"


def _table(title: str) -> Table:
    """A table whose columns stand two characters apart: nine fit into 80."""
    return Table(
        box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left"
    )


def _alike(plan: Plan) -> list[list[PlannedClient]]:
    """The clients in groups that need and have the same."""
    groups = dict[object, list[PlannedClient]]()
    for client in plan.clients:
        has_rows = bool(client.tokens)
        key = client.rank, client.batch, client.memory, client.available, has_rows
        groups.setdefault(key, []).append(client)
    return list(groups.values())


def _row(clients: list[PlannedClient], has_room: bool) -> list[str | Text]:
    one, numbers = clients[0], [str(client.client) for client in clients]
    shown = " ".join(numbers) if len(numbers) < 3 else f"{numbers[0]} +{len(numbers) - 1}"
    row: list[str | Text] = [shown, str(one.rank), str(one.batch)]
    if one.memory is None:
        has = human_bytes(one.available or 0) if one.tokens else "no rows"
        return [*row, *["-"] * 5, *([has] if has_room else [])]
    memory = one.memory
    sizes = (
        memory.weights + memory.merged,
        memory.adapter,
        memory.optimizer,
        memory.activations,
    )
    row += [human_bytes(size) for size in sizes]
    row.append(Text(human_bytes(memory.total), style="red" if one.fits is False else ""))
    if has_room:
        row.append(human_bytes(one.available or 0))
    return row


def _methods(plan: Plan) -> Table:
    """Bytes of every method, the configured one first."""
    table = _table("Bytes of all clients: up and down in a late round, and in all rounds")
    table.add_column("method")
    for name in ("up", "down", "all up", "all down", "server keeps"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, x in plan.traffic.items():
        sizes = (x.up, x.down, x.all_up, x.all_down, x.state)
        style = "bold" if name == plan.session.config.method else ""
        table.add_row(name, *(human_bytes(size) for size in sizes), style=style)
    return table


def _excluded(excluded: Mapping[str, str]) -> str:
    """Which methods cannot run, and why; those with the same reason together, without advice."""
    groups = dict[str, list[str]]()
    for name, reason in excluded.items():
        groups.setdefault(reason.partition(";")[0], []).append(name)
    parts = [f"{', '.join(names)} ({reason})" for reason, names in groups.items()]
    return f"Not with these settings: {'; '.join(parts)}."


def _time(plan: Plan) -> str:
    here, apart = plan.seconds_here, plan.seconds_apart
    if plan.speed is None or here is None or apart is None:
        return f"Time of a round: {plan.no_speed}"
    return (
        f"Training of a round takes about {duration(here)} on this machine, or {duration(apart)} "
        f"where each client has a machine like it ({plan.speed.tokens:,.0f} tokens a second, "
        f"measured for {plan.speed.seconds:.0f} s); {plan.session.config.num_rounds} rounds: "
        f"{duration(here * plan.session.config.num_rounds)}. Evaluation comes on top."
    )


def duration(seconds: float) -> str:
    """`90` -> `1.5 min`."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
