"""Describes what was run, on what and with what, in the first line of `metrics.jsonl`."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from fedlora import __version__
from fedlora.runs.file_names import AS_WRITTEN
from fedlora.runs.session import Session


def config_file(session: Session) -> str:
    """What `config.yaml` says: the resolved configuration and, in a comment at its end, as the user
    wrote them the keys that the run settled by itself (automatic values, ranks drawn by the seed).
    """
    asked = json.dumps(dict(session.asked), default=str)
    return f"{session.config.to_yaml()}{AS_WRITTEN}{asked}\n"


def begin_line(session: Session) -> dict[str, Any]:
    """A run's `begin` line.

    Returns:
        started (ISO 8601, UTC), the versions and the device; model, its architecture and number of
        `parameters`; method and task; `modules` (target module -> `[m, n]`); `dense_parameters`
        trained whole; `clients` (rank, rows and tokens to train on, eval_rows held out, and
        counts: value of `column` -> rows as they were read, dropped and held-out ones among them);
        `eval_rows`; `alone`, the client that trains by itself, or None.
    """
    base, data, spec, held = session.base, session.data, session.federation, session.label_counts
    model = base.model
    clients = []
    for client, part in enumerate(data.clients):
        counts = dict(zip(held.values, held.counts[client], strict=True)) if held else {}
        clients.append(
            {
                "client": client,
                "name": held.names[client] if held else "",
                "rank": spec.ranks[client],
                "rows": len(part.train),
                "eval_rows": len(part.eval),
                "tokens": sum(len(row["input_ids"]) for row in part.train),
                "counts": {value: n for value, n in counts.items() if n},
            }
        )
    return {
        "event": "begin",
        "round": 0,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "fedlora": __version__,
        "model": session.config.model_name_or_path,
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "method": session.config.method,
        "task": session.config.lora_task_type,
        "num_rounds": session.config.num_rounds,
        "modules": {name: list(shape) for name, shape in spec.shapes.items()},
        "dense_parameters": sum(p.numel() for p in base.full_params.values()),
        "clients": clients,
        "column": held.column if held else None,
        "eval_rows": len(data.eval),
        "alone": session.lone,
        "environment": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft")},
            "device": _device(session),
            "threads": session.config.num_threads,
        },
    }


def _device(session: Session) -> str:
    if session.base.device.type != "cuda":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(session.base.device)
