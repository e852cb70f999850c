"""Holds a room for each verb of the command line: its help, what it takes, and its function.

Each has `HELP`, `SYNTAX` and `verb(arguments, emit)`, which gives the exit code. `emit` writes a
line of JSON, and is None where a person looks on.
"""

from __future__ import annotations

VERBS = {
    "run": "fedlora.commands.run",
    "partition": "fedlora.commands.partition",
    "data": "fedlora.commands.data",
    "aggregate": "fedlora.commands.aggregate",
    "export": "fedlora.commands.export.verb",
    "config": "fedlora.commands.config",
    "plan": "fedlora.commands.plan.verb",
    "demo": "fedlora.commands.demo.verb",
    "watch": "fedlora.commands.watch.verb",
    "status": "fedlora.commands.status",
    "report": "fedlora.commands.report.verb",
    "eval": "fedlora.commands.eval.verb",
    "generate": "fedlora.commands.generate",
    "chat": "fedlora.commands.chat.verb",
    "study": "fedlora.commands.study.verb",
    "worker": "fedlora.commands.worker.verb",
    "deploy": "fedlora.commands.deploy.verb",
    "doctor": "fedlora.commands.doctor.verb",
    "completion": "fedlora.commands.completion",
}
"""Every verb's module, which is imported when it is used."""
