"""Runs `fedlora demo`: two methods and every client alone, on the embedded default."""

from __future__ import annotations

from fedlora.commands.console import quiet_libraries
from fedlora.commands.json_lines import Emit
from fedlora.config.arguments import Option, Syntax, parse_overrides

HELP = """\
fedlora demo [--output_dir DIR] [--seeds 0 1 2] [--processes N] [--key value ...] [--json]

Runs exact and flora on ten clients of ranks 64 32 16 16 8 8 4 4 4 4 in four rounds of 20 steps, and
every client alone; ends with a table and a picture of exact match by round. With several seeds it
shows means, and what the differences of the two methods are worth. Keys go to every run.

  --seeds 0 1 2   over several seeds, the clients alone on the first; without it seed 0
  --processes N   runs at a time; without it as many as there are cores, with one thread each
  --json          one JSON object, demo, with every seed's exact match by round
"""
SYNTAX = Syntax(
    {
        "seeds": Option("of the runs", many=True),
        "processes": Option("runs at a time"),
    },
    keys=True,
)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora demo`."""
    quiet_libraries()
    from fedlora.commands.demo.showcase import demo

    demo(parse_overrides(arguments), emit)
    return 0
