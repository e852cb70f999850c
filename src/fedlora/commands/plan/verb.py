"""Runs `fedlora plan`: memory, bytes, disk and time of a run, before a weight is read."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fedlora.commands.console import quiet_libraries
from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import CONFIGURATION, Option, Syntax, take
from fedlora.config.config import Config
from fedlora.config.sources import settings
from fedlora.embedded import EMBEDDED
from fedlora.errors import InputError

if TYPE_CHECKING:
    from fedlora.runs.planning.plan import Plan, PlannedClient

HELP = """\
fedlora plan [CONFIG.yaml] [--key value ...] [--no_calibration] [--json]

Shows what a run would take, before a weight is read: memory of every client (base, adapter,
optimiser, activations of its longest micro-batch), bytes up and down with every method, memory and
disk of the server, and the time of a round. It reads the rows, the tokenizer and the model's
configuration; weights need not be downloaded. Nothing is written.

  --client_memory 6GB 12GB 24GB   what each client has (one value: all have it); GB are 10^9 bytes
  --client_ranks auto             the highest rank up to --lora_r that fits, then the largest
                                  micro-batch; as many more of them make a step
  --no_calibration   leave out the time, which ten seconds of training with random weights tell
  --json             one JSON object: parameters, clients, methods, server, time

The run itself takes client_ranks: auto too, and decides the same.

Examples:
  fedlora plan my.yaml
  fedlora plan my.yaml --client_ranks auto --client_memory 6GB 12GB 24GB --lora_r 64
  fedlora plan my.yaml --gradient_checkpointing --no_calibration
"""
SYNTAX = Syntax(
    {"no_calibration": Option("leave out the time of a round", flag=True)},
    CONFIGURATION,
    keys=True,
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora plan`."""
    without_time = take(arguments, SYNTAX)["no_calibration"]
    quiet_libraries()
    from rich.console import Console

    from fedlora.commands.plan.show import show_plan
    from fedlora.runs.planning.plan import SECONDS, make_plan

    config = Config(**settings(arguments, EMBEDDED))
    if config.trains_at_sites:
        raise InputError(
            "fedlora plan looks at rows, which lie at the sites; plan with a file that is like "
            "theirs: --engine local --sites none --train_file FILE"
        )
    plan = make_plan(config, seconds=None if without_time else SECONDS)
    if emit:
        emit(as_json(plan))
    else:
        show_plan(plan, Console())
    return 0


def as_json(plan: Plan) -> dict[str, Any]:
    """A plan as a program reads it; sizes are bytes, times seconds."""
    config = plan.session.config
    return {
        "event": "plan",
        "config": config.flat(),
        "parameters": plan.parameters,
        "target_modules": len(plan.session.federation.shapes),
        "clients_per_round": len(plan.session.federation.sample(1)),
        "why_no_memory": plan.no_memory or None,
        "clients": [_client(client) for client in plan.clients],
        "methods": {name: asdict(x) for name, x in plan.traffic.items()},
        "excluded": dict(plan.excluded),
        "server": {"memory": plan.server_memory, "disk": plan.server_disk},
        "time": {
            "tokens_per_second": plan.speed.tokens if plan.speed else None,
            "round_on_this_machine": plan.seconds_here,
            "round_on_machines_like_this": plan.seconds_apart,
            "why_not": plan.no_speed or None,
        },
        "choices": list(plan.session.choices),
        "warnings": list(plan.session.warnings),
    }


def _client(planned: PlannedClient) -> dict[str, Any]:
    memory = planned.memory
    return {
        "client": planned.client,
        "rank": planned.rank,
        "batch": planned.batch,
        "tokens": planned.tokens,
        "memory": {**asdict(memory), "total": memory.total} if memory else None,
        "available": planned.available,
        "fits": planned.fits,
        "seconds": planned.seconds,
    }
