"""Shows what a run would do: `fedlora run --dry_run`."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedlora.client.worker import local_training_of
from fedlora.commands.views.sentences import say
from fedlora.federation.compression import BYTES
from fedlora.lowrank import scaling
from fedlora.model.quantisation import held_in
from fedlora.runs.session import Session
from fedlora.text import human_bytes


@dataclass(frozen=True)
class ClientPlan:
    """What a client would do in a round.

    Args:
        client: its number.
        rank: of its adapter.
        scale: of the adapter, `alpha / r` or `alpha / sqrt(r)`.
        rows, tokens: to train on.
        steps: of a round.
        parameters: trained, and sent.
        bytes_up: of a round, to the server.
    """

    client: int
    rank: int
    scale: float
    rows: int
    tokens: int
    steps: int
    parameters: int
    bytes_up: int


def client_plans(session: Session) -> list[ClientPlan]:
    """What every client would do, from the shapes of the model and the tokenised data."""
    spec, plans = session.federation, []
    dense = sum(p.numel() for p in session.base.full_params.values())
    compression = spec.agreement.compression
    for client, part in enumerate(session.data.clients):
        own, rank = session.config.of_client(client), spec.ranks[client]
        trained = spec.trained_by(client)
        shapes = [s for n, s in spec.shapes.items() if trained is None or n in trained]
        numbers = sum(rank * (m + n) for m, n in shapes)
        scales = 2 * rank * len(shapes) if compression == "int8" else 0
        plans.append(
            ClientPlan(
                client,
                rank,
                scaling(own.alpha(rank), rank, own.use_rslora),
                len(part.train),
                sum(len(row["input_ids"]) for row in part.train),
                local_training_of(own).steps(len(part.train)) if part.train else 0,
                numbers + dense,
                BYTES[compression] * numbers + 4 * (dense + scales),
            )
        )
    return plans


def show_plan(session: Session, console: Console) -> None:
    """What a run would do, from the shapes of the model and the tokenised data."""
    config, base, data, spec = session.config, session.base, session.data, session.federation
    parameters = base.num_parameters
    dense = sum(p.numel() for p in base.full_params.values())
    say(
        console,
        f"{config.model_name_or_path}: {type(base.model).__name__}, {_count(parameters)} "
        f"parameters ({held_in(config)})\n{len(spec.shapes)} target modules: "
        + ", ".join(base.targets.names[:8])
        + (" ..." if len(base.targets.names) > 8 else ""),
    )
    if dense:
        names = ", ".join(base.targets.modules_to_save)
        say(console, f"trained whole: {names} ({_count(dense)} parameters)")
    for warning in session.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))
    training = local_training_of(config)
    say(
        console,
        f"method {config.method}, {config.num_rounds} rounds, {len(spec.sample(1))} of "
        f"{len(spec.ranks)} clients in each; batches of {training.per_device_train_batch_size} x "
        f"{training.gradient_accumulation_steps}, learning rate {config.learning_rate:g}",
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("client", "rank", "scale", "rows", "tokens", "steps a round", "trained", "up"):
        table.add_column(name, justify="right")
    for plan in client_plans(session):
        table.add_row(
            str(plan.client),
            str(plan.rank),
            f"{plan.scale:g}",
            f"{plan.rows:,}",
            f"{plan.tokens:,}",
            f"{plan.steps:,}" if plan.rows else "-",
            _count(plan.parameters),
            human_bytes(plan.bytes_up),
        )
    console.print(table)
    assert not isinstance(config.client_overrides, str)
    for client, values in sorted((config.client_overrides or {}).items()):
        settings = ", ".join(f"{key} {value}" for key, value in values.items())
        say(console, f"client {client} by itself: {settings}")
    say(
        console,
        f"{len(data.eval):,} rows to evaluate on; template {data.template}. Everything fits "
        "together; no weights were read and nothing was written.",
    )


def _count(number: float) -> str:
    for unit in ("", " K", " M", " B"):
        if number < 1000 or unit == " B":
            return f"{number:.0f}{unit}" if unit in ("", " K") else f"{number:.1f}{unit}"
        number /= 1000
    raise AssertionError
