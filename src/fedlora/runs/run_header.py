"""Describes what is run, on what and with what, to listeners and in a run's files."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from fedlora import __version__
from fedlora.runs.events import Begin, Header
from fedlora.runs.file_names import AS_WRITTEN
from fedlora.runs.run_session import RunSession


def config_file(session: RunSession) -> str:
    """What `config.yaml` says: the resolved configuration and, in a comment at its end, as the user
    wrote them the keys that the run settled by itself (automatic values, ranks drawn by the seed).
    """
    asked = json.dumps(dict(session.asked), default=str)
    return f"{session.config.to_yaml()}{AS_WRITTEN}{asked}\n"


def begin_event(session: RunSession, output_dir: Path, resumed_from: int | None) -> Begin:
    """What a run tells its listeners when it begins or goes on."""
    config, federation = session.config, session.federation
    return Begin(
        event="begin",
        output_dir=str(output_dir),
        resumed_from=resumed_from,
        model=config.model_name_or_path,
        method=config.method,
        task=config.lora_task_type,
        num_rounds=config.num_rounds,
        parameters=_parameters(session),
        modules=len(federation.shapes),
        ranks=list(federation.ranks),
        rows=list(federation.num_examples),
        eval_rows=len(session.data.eval),
        choices=list(session.choices),
    )


def header(session: RunSession) -> Header:
    """The first line of a run's `metrics.jsonl`."""
    base, data, spec, config = session.base, session.data, session.federation, session.config
    head = Header(
        event="begin",
        round=0,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        fedlora=__version__,
        model=config.model_name_or_path,
        architecture=type(base.model).__name__,
        parameters=_parameters(session),
        method=config.method,
        task=config.lora_task_type,
        num_rounds=config.num_rounds,
        modules={name: list(shape) for name, shape in spec.shapes.items()},
        dense_parameters=sum(p.numel() for p in base.full_params.values()),
        clients=session.clients,
        column=session.column,
        eval_rows=len(data.eval),
        alone=session.lone,
        environment={
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft")},
            "device": _device(session),
            "threads": config.num_threads,
        },
    )
    if session.run:
        head["run"] = session.run
    return head


def _parameters(session: RunSession) -> int:
    return session.base.num_parameters


def _device(session: RunSession) -> str:
    if session.base.device.type != "cuda":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(session.base.device)
