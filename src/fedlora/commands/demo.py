"""`fedlora demo`: three methods and every client alone, on the embedded default."""

from __future__ import annotations

from fedlora.arguments import Syntax, parse_overrides
from fedlora.console import quiet_libraries
from fedlora.json_lines import Emit

HELP = """\
fedlora demo [--output_dir DIR] [--key value ...] [--json]

Runs exact, flora and zero_pad on ten clients of ranks 64 32 16 16 8 8 4 4 4 4, and every client
alone; ends with a table and a picture of exact match by round. Keys go to every run.

  --json   one JSON object per event of every run, with its method; then one, demo, with the table
"""
SYNTAX = Syntax(keys=True)


def verb(arguments: list[str], emit: Emit | None = None) -> int:
    """`fedlora demo`."""
    quiet_libraries()
    from fedlora.showcase import demo

    demo(parse_overrides(arguments), emit)
    return 0
